"""What a second shuffle over all parts (activations.remix) takes, by arithmetic."""

from collections.abc import Sequence

from sae.config import FrozenConfig
from sae.estimate import PlaceEstimate
from sae.estimate_needs import Requests, upload_requests
from sae.extract.deal import count_buckets
from sae.plan import Plan
from sae.store import layout
from sae.store.part.encoding import stored_dtype
from sae.store.storage.filesystem import Storage


class RemixEstimate(FrozenConfig):
    """The training rows of one hook point once more; while it is made, as much again is stored."""

    hook_point: str
    control: bool
    """Of the untrained control."""
    n_parts: int
    n_bytes: int
    """Of the copy that stays."""
    requests: Requests
    done: bool
    """In the store already; then it takes no requests."""


def estimate_remixes(plan: Plan, storage: Storage, places: Sequence[PlaceEstimate]) -> list[RemixEstimate]:
    """The remixes of a plan, its control's included. Raises: ConfigError when they would have too many parts."""
    found = []
    for each in (plan, plan.control):
        for hook_point, (spec, _) in each.remixed.items() if each else ():
            key = hook_point, "train", each is not plan
            (place,) = (p for p in places if (p.hook_point, p.split, p.control) == key)
            row_bytes = place.d_in * stored_dtype(place.dtype).itemsize
            n_parts = count_buckets(place.n_rows, row_bytes, spec.part_bytes)
            done = storage.exists(layout.record_path(spec.ref))
            found.append(
                RemixEstimate(
                    hook_point=hook_point,
                    control=each is not plan,
                    n_parts=n_parts,
                    n_bytes=place.n_bytes,
                    requests=Requests(0, 0) if done else _requests(place, n_parts),
                    done=done,
                )
            )
    return found


def _requests(place: PlaceEstimate, n_parts: int) -> Requests:
    """Every part read and dealt, every piece of a dealt part read, every remixed part written. Two ranges a read."""
    writes = place.n_parts * upload_requests(place.n_bytes / max(place.n_parts, 1))
    writes += n_parts * upload_requests(place.n_bytes / max(n_parts, 1))
    pieces = place.n_parts * n_parts
    return Requests(writes, 2 * (place.n_row_groups + pieces) + 3 * (place.n_parts + n_parts))
