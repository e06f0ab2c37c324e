"""What a plan takes, by arithmetic: rows, bytes, parts, requests, memory, money. Nothing is measured or written here.

Exact where the store already says how many contexts there are and how they are cut; before that, text is taken for
BYTES_PER_TOKEN bytes a token, and special tokens, which are few and not stored, are counted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae.config import FrozenConfig
from sae.errors import ConfigError
from sae.extract.config import ActivationsConfig, GivenPartsSpec
from sae.extract.filling import BUFFERS
from sae.extract.part import contexts_per_part
from sae.memory import machine_bytes, readable
from sae.plan import Place, Plan
from sae.preflight import BYTES_PER_TOKEN, IDENTITY_BYTES, Size, text_bytes
from sae.store import layout
from sae.store.artefacts.records import read_record
from sae.store.part.encoding import stored_dtype
from sae.store.reading.mixing import expected_variance
from sae.store.reading.order import RowGroups, ShuffleConfig, ShuffleSizes
from sae.store.reading.windows import WINDOWS_AHEAD
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import PIECE_BYTES
from sae.store.storage.s3 import UPLOAD_BYTES
from sae.train.schedule import count_steps

DEFAULT_PRICES = {"storage": 0.023, "put": 0.005, "get": 0.0004, "hour": 2.0}
"""Dollars: per GB and month, per 1000 requests that write or list, per 1000 that read (S3 standard storage, us-east-1),
and per hour of the machine (a rented GPU)."""


class PlaceEstimate(FrozenConfig):
    """The activations of one hook point and split."""

    hook_point: str
    split: str
    control: bool
    """Of the untrained control."""
    n_rows: int
    d_in: int
    dtype: str
    n_bytes: int
    """Of the Parquet files: vectors, identities; headers and footers are a thousandth."""
    n_parts: int
    n_parts_done: int
    """Of these, in the store already."""
    part_rows: int
    """Of a full part."""
    row_group_rows: int
    n_row_groups: int
    counted: bool
    """Whether tokens were counted; else they are estimated from the bytes of text."""


class TrainEstimate(FrozenConfig):
    """One SAE."""

    index: int
    """saes.<index>"""
    hook_point: str
    d_in: int
    d_sae: int
    n_rows: int
    """Rows trained on, over all epochs."""
    n_steps: int
    epochs: float
    done: bool
    """In the store already."""


class Requests(NamedTuple):
    """To a bucket. Those that list are priced like those that write."""

    puts: int
    gets: int


class Cost(FrozenConfig):
    """Dollars at given prices."""

    storage_per_month: float
    requests: float
    machine: float


def estimate_places(plan: Plan, storage: Storage, sizes: Mapping[Place, Size]) -> list[PlaceEstimate]:
    """The activations that a plan extracts, its control's included.

    Args:
        sizes: from `sae.preflight.plan_sizes`.

    Raises: ConfigError when the amount of text or the width of the activations is known to nobody.
    """
    return [
        _estimate_place(each, place, storage, sizes.get(place), control=each is not plan)
        for each in (plan, plan.control)
        if each is not None
        for place in each.parts
    ]


def estimate_training(plan: Plan, storage: Storage, places: Sequence[PlaceEstimate]) -> list[TrainEstimate]:
    """The SAEs that a plan trains, the control's left out."""
    found = []
    for index, spec in enumerate(plan.saes):
        config = spec.config
        (place,) = (p for p in places if (p.hook_point, p.split, p.control) == (config.hook_point, "train", False))
        n_rows = config.n_tokens or place.n_rows
        found.append(
            TrainEstimate(
                index=index,
                hook_point=place.hook_point,
                d_in=place.d_in,
                d_sae=config.sae.d_sae,
                n_rows=n_rows,
                n_steps=count_steps(n_rows, max(place.n_rows, 1), config.batch_rows),
                epochs=n_rows / max(place.n_rows, 1),
                done=storage.exists(layout.record_path(spec.ref)),
            )
        )
    return found


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


def _estimate_place(plan: Plan, place: Place, storage: Storage, size: Size | None, *, control: bool) -> PlaceEstimate:
    specs = plan.parts[place]
    recorded = [read_record(storage, spec.ref) for spec in specs]
    d_in = next((int(record.metrics["d_in"]) for record in recorded if record), size.d_in if size else None)
    if d_in is None:
        raise ConfigError(
            f"activations.hook_points: how wide {place[0]!r} is can be told by a run of the model alone "
            f"(subject.trust_remote_code). Run with a small activations.n_tokens first; its plan is recorded."
        )
    row_bytes = d_in * stored_dtype(specs[0].dtype).itemsize
    # [tokens of each part set], and how many of them a full part holds
    if isinstance(specs[0], GivenPartsSpec):
        per_part = max(1, specs[0].part_bytes // row_bytes)
        record = recorded[0]
        n_rows = int(record.metrics["n_contexts"]) if record else (size.n_rows if size else None)
        if n_rows is None:
            raise ConfigError(f"activations.sets.{place[0]}: its size is not known")
        available, counted = [n_rows], True
    else:
        assert isinstance(plan.config.activations, ActivationsConfig)
        assert plan.config.corpus
        width = plan.config.corpus.context_tokens
        per_part = contexts_per_part(specs[0], width, d_in) * width
        contexts, counted = _contexts(plan, place, storage)
        available = [n * width for n in contexts]
    row_group_rows = max(1, specs[0].row_group_bytes // row_bytes)
    n_rows = n_parts = n_groups = 0
    wanted = plan.snapshots[place].n_tokens
    for n_tokens in available:
        if wanted is not None:  # in whole parts, as in sae.store.snapshots.snapshot.parts_wanted
            taken = min(-(-n_tokens // per_part), -(-wanted // per_part)) * per_part
            n_tokens, wanted = min(n_tokens, taken), wanted - min(wanted, taken)
        full, rest = divmod(n_tokens, per_part)
        n_rows += n_tokens
        n_parts += full + bool(rest)
        n_groups += full * -(-per_part // row_group_rows) + -(-rest // row_group_rows)
    done = sum(name.startswith("part-") and name.endswith(".json") for spec in specs for name in storage.list(spec.ref))
    return PlaceEstimate(
        hook_point=place[0],
        split=place[1],
        control=control,
        n_rows=n_rows,
        d_in=d_in,
        dtype=specs[0].dtype,
        n_bytes=n_rows * (row_bytes + IDENTITY_BYTES),
        n_parts=n_parts,
        n_parts_done=min(done, n_parts),
        part_rows=min(per_part, max(available)),
        row_group_rows=row_group_rows,
        n_row_groups=n_groups,
        counted=counted,
    )


def _contexts(plan: Plan, place: Place, storage: Storage) -> tuple[list[int], bool]:
    """Contexts of every segment, and whether they were counted. Raises: ConfigError when nobody knows."""
    corpus = plan.config.corpus
    assert corpus
    found, counted = [], True
    for index, spec in enumerate(plan.tokens):
        record = read_record(storage, spec.ref)
        if record is not None:
            found.append(int(record.metrics[place[1]]["n_contexts"]))
            continue
        counted = False
        tally = plan.tallies[index]
        if tally is not None:
            found.append(text_bytes(tally, place[1]) // BYTES_PER_TOKEN // corpus.context_tokens)
            continue
        wanted = plan.snapshots[place].n_tokens
        if wanted is None:
            raise ConfigError(
                f"activations.{'n_heldout_tokens' if place[1] == 'heldout' else 'n_tokens'}: how much text "
                f"corpus.segments.{index} holds is known only once it is read. Set it, to plan."
            )
        found.append(-(-wanted // corpus.context_tokens))  # as if it had what is asked for
    return found, counted


def _goes(place: PlaceEstimate, split: str) -> bool:
    return place.split == split and not place.control
