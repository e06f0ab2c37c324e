"""How much a plan extracts and trains on, by arithmetic: rows, bytes, parts, steps. Nothing is measured or written.

Exact where the store already says how many contexts there are and how they are cut; before that, text is taken for
BYTES_PER_TOKEN bytes a token, and special tokens, which are few and not stored, are counted.
"""

from collections.abc import Mapping, Sequence

from sae.config import FrozenConfig
from sae.errors import ConfigError
from sae.extract.config import ActivationsConfig, GivenPartsSpec
from sae.extract.part import contexts_per_part
from sae.plan import Place, Plan
from sae.preflight import BYTES_PER_TOKEN, IDENTITY_BYTES, Size, text_bytes
from sae.store import layout
from sae.store.artefacts.records import read_record
from sae.store.part.encoding import stored_dtype
from sae.store.storage.filesystem import Storage
from sae.train.schedule import count_steps


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


def place_width(plan: Plan, place: Place, storage: Storage, size: Size | None) -> int:
    """d_in of the activations of a hook point. Raises: ConfigError when only a run of the model can tell."""
    recorded = [read_record(storage, spec.ref) for spec in plan.parts[place]]
    d_in = next((int(record.metrics["d_in"]) for record in recorded if record), size.d_in if size else None)
    if d_in is None:
        raise ConfigError(
            f"activations.hook_points: how wide {place[0]!r} is can be told by a run of the model alone "
            f"(subject.trust_remote_code). Run with a small activations.n_tokens first; its plan is recorded."
        )
    return d_in


def _estimate_place(plan: Plan, place: Place, storage: Storage, size: Size | None, *, control: bool) -> PlaceEstimate:
    specs = plan.parts[place]
    recorded = [read_record(storage, spec.ref) for spec in specs]
    d_in = place_width(plan, place, storage, size)
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
