"""What the estimated work asks of a machine and a bucket, by arithmetic: requests, memory, money, how well rows mix."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae.config import FrozenConfig
from sae.errors import ConfigError
from sae.estimate import PlaceEstimate, TrainEstimate
from sae.extract.filling import BUFFERS
from sae.memory import machine_bytes, readable
from sae.plan import Plan
from sae.preflight import IDENTITY_BYTES
from sae.store.part.encoding import stored_dtype
from sae.store.reading.mixing import expected_variance
from sae.store.reading.shuffle import RowGroups, ShuffleConfig, ShuffleSizes
from sae.store.reading.windows import WINDOWS_AHEAD
from sae.store.storage.ranges import PIECE_BYTES
from sae.store.storage.s3 import UPLOAD_BYTES

DEFAULT_PRICES = {"storage": 0.023, "put": 0.005, "get": 0.0004, "hour": 2.0}
"""Dollars: per GB and month, per 1000 requests that write or list, per 1000 that read (S3 standard storage, us-east-1),
and per hour of the machine (a rented GPU)."""


class Requests(NamedTuple):
    """To a bucket. Those that list are priced like those that write."""

    puts: int
    gets: int


class Cost(FrozenConfig):
    """Dollars at given prices."""

    storage_per_month: float
    requests: float
    machine: float


def count_requests(plan: Plan, places: Sequence[PlaceEstimate], training: Sequence[TrainEstimate]) -> Requests:
    """Requests that the rest of the work takes on a bucket, about: retries and everything but activations left out.

    A part: `upload_requests`; asked for before, in its commit, and by its snapshot. A row group: read once an epoch by
    each sweep, and with its identity (another range) by the statistics of every SAE, by the evaluation where it is
    held out; in pieces when it is large.
    """
    puts = gets = 0
    for place in places:
        puts += (place.n_parts - place.n_parts_done) * upload_requests(place.n_bytes / max(place.n_parts, 1))
        gets += (place.n_parts - place.n_parts_done) * 3
    sweeps = {(t.hook_point, plan.saes[t.index].config.batch_rows): t.epochs for t in training if not t.done}
    for place in places:
        if place.control:
            continue
        here = [t for t in training if t.hook_point == place.hook_point and not t.done]
        passes = sum(epochs for (hook_point, _), epochs in sweeps.items() if hook_point == place.hook_point)
        pieces = -(-group_bytes(place) // PIECE_BYTES)
        gets += round(place.n_row_groups * pieces * passes) if place.split == "train" else 0
        gets += (pieces + 1) * place.n_row_groups * len(here) * (2 if place.split == "heldout" else 1)
        if place.split == "heldout":  # thresholds are calibrated on them
            gets += pieces * place.n_row_groups * sum(plan.saes[t.index].calibration is not None for t in here)
    return Requests(puts, gets)


def upload_requests(part_bytes: float) -> int:
    """Requests that store a part: listed before, uploaded (in pieces when it is large), recorded, listed."""
    return 3 + (1 if part_bytes <= UPLOAD_BYTES else 2 + -(-int(part_bytes) // UPLOAD_BYTES))


def extraction_bytes(plan: Plan, places: Sequence[PlaceEstimate], model_bytes: int) -> int:
    """Memory of the extraction, about: in every worker the model, and of each hook point a part that is filled and one
    that is written."""
    if plan.subject is None:
        return 0
    parts = max(
        sum(p.part_rows * (p.d_in * BUFFERS[p.dtype].itemsize + IDENTITY_BYTES) for p in places if _goes(p, split))
        for split in ("train", "heldout")
    )
    return plan.config.execution.max_workers * (model_bytes + 2 * parts)


def shuffle_sizes(place: PlaceEstimate) -> ShuffleSizes:
    """How far the loader will spread the rows of a place."""
    rows = [place.row_group_rows] * (place.part_rows // place.row_group_rows)
    if rest := place.part_rows % place.row_group_rows:
        rows.append(rest)
    # One part stands for all: its size and its row groups' are what counts.
    return ShuffleConfig().sizes(RowGroups.of([rows]), place.d_in * stored_dtype(place.dtype).itemsize)


def group_bytes(place: PlaceEstimate) -> int:
    """Bytes of a row group's vectors."""
    return min(place.row_group_rows, place.part_rows) * place.d_in * stored_dtype(place.dtype).itemsize


def window_bytes(place: PlaceEstimate, batch_rows: int) -> int:
    """Memory of the loader: the windows in use, those read ahead, and two batches in float32."""
    shuffle = shuffle_sizes(place)
    n_groups = shuffle.window_row_groups + WINDOWS_AHEAD * shuffle.groups_per_window(batch_rows)
    return min(n_groups, place.n_row_groups) * group_bytes(place) + 2 * batch_rows * place.d_in * 4


def batch_variance(plan: Plan, place: PlaceEstimate, batch_rows: int, rho: float) -> float:
    """The expected variance of batch means over that of independent rows (sae.store.reading.mixing).

    Args:
        rho: correlation of two rows of a context.
    """
    assert plan.config.corpus
    return expected_variance(
        shuffle_sizes(place),
        n_parts=max(1, round(place.n_rows / place.part_rows)),
        part_rows=place.part_rows,
        row_group_rows=place.row_group_rows,
        batch_rows=batch_rows,
        context_rows=plan.config.corpus.context_tokens,
        rho=rho,
    )


def check_memory(plan: Plan, places: Sequence[PlaceEstimate], model_bytes: int) -> None:
    """Raises: ConfigError when extraction or the loader's windows need more memory than this machine has."""
    available = machine_bytes()
    if (needed := extraction_bytes(plan, places, model_bytes)) > available:
        n_workers = plan.config.execution.max_workers
        raise ConfigError(
            f"activations.part_bytes: extraction needs about {readable(needed)} of memory ({n_workers} workers, each "
            f"with a model of {readable(model_bytes)} and two parts of each hook point), this machine has "
            f"{readable(available)}. Lower it, or execution.max_workers."
        )
    for index, spec in enumerate(plan.saes):
        (place,) = (p for p in places if (p.hook_point, p.split, p.control) == (spec.config.hook_point, "train", False))
        if (needed := window_bytes(place, spec.config.batch_rows)) > available:
            raise ConfigError(
                f"activations.row_group_bytes: the windows of the shuffle that saes.{index} is trained from need "
                f"{readable(needed)} of memory, this machine has {readable(available)}. Lower it, or "
                f"activations.n_tokens until the store is smaller than its windows."
            )


def cost(n_bytes: int, requests: Requests, hours: float, prices: Mapping[str, float], *, on_bucket: bool) -> Cost:
    """What bytes, requests and hours cost. A local disk costs nothing here."""
    return Cost(
        storage_per_month=n_bytes / 1e9 * prices["storage"] if on_bucket else 0.0,
        requests=(requests.puts * prices["put"] + requests.gets * prices["get"]) / 1000 if on_bucket else 0.0,
        machine=hours * prices["hour"],
    )


def _goes(place: PlaceEstimate, split: str) -> bool:
    return place.split == split and not place.control
