"""What can be known to be wrong with a plan before work starts: the root, the input, sizes that cannot fit.

Bounds are one-sided: what is refused here could not have worked. How many tokens a text has is known only once it is
tokenized, so `check_tokens` looks again then.
"""

import contextlib
import logging
from typing import NamedTuple

from sae.device import check_gpus
from sae.errors import ConfigError, DamagedError, InputError
from sae.explain.config import ChatEndpoint
from sae.explain.endpoint import read_key
from sae.extract.config import ActivationsConfig, GivenActivations, GivenPartsSpec, Split
from sae.extract.corpus import Tally
from sae.extract.given import measure_given
from sae.memory import check_fits, readable
from sae.pipeline_config import ExecutionConfig
from sae.plan import Place, Plan
from sae.store import layout
from sae.store.artefacts.records import read_record, require_record
from sae.store.part.encoding import stored_dtype
from sae.store.snapshots.snapshot import SnapshotSpec
from sae.store.storage.filesystem import Storage
from sae.subject.config import EmbeddedLM
from sae.subject.preflight import TRAINING_BYTES, check_subject
from sae.train.logs import check_logs
from sae.train.selection import TILE_ROWS

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 5
"""Of text, about, for the estimate of the disk that is needed; most tokenizers make more tokens of it."""
IDENTITY_BYTES = 12
"""Of a stored row, beside its vector: context, position, token."""
ALPHABET = 257
"""Tokens that a byte-level vocabulary has before it learns any: bytes, and a separator."""
STATISTICS_BYTES = 2048
"""Per latent: two histograms of 128 counts."""


class Size(NamedTuple):
    """How large the activations of one hook point and split can become."""

    most_rows: int | None
    """They have no more rows than this; None: not known."""
    n_rows: int | None
    """About how many are stored; None: not known."""
    d_in: int | None
    """None: only a run of the model can tell."""
    itemsize: int


def check_plan(plan: Plan) -> None:
    """Find what can be known to be wrong before work starts; nothing is written.

    Raises:
        InputError: the model lacks a hook point or cannot be built; too little text; given activations that are not
            finite, constant or of another shape.
        ConfigError: a batch larger than the data, what cannot fit into memory or on the root's disk, or a training log
            whose package is not installed.
        StoreError: the root holds artefacts of a newer format.
    """
    check_logs(plan.config.execution.training_logs)
    check_root(plan)
    sizes = plan_sizes(plan)
    check_batches(plan, sizes)
    check_training_memory(plan, sizes)
    check_disk(plan, sizes)


def check_root(plan: Plan) -> None:
    """Raises: StoreError when the root holds the plan's artefacts in a newer format."""
    storage = Storage(plan.config.execution.root)
    for spec in plan.specs():
        with contextlib.suppress(DamagedError):  # computed again
            read_record(storage, spec.ref)


def plan_sizes(plan: Plan) -> dict[Place, Size]:
    """Read given activations, or build the model without its weights, and see how much there is.

    Sets that are in the store already are left out. Raises: InputError, and ConfigError for a model that does not fit
    into memory.
    """
    return _given_sizes(plan, Storage(plan.config.execution.root)) if plan.subject is None else _model_sizes(plan)


def check_batches(plan: Plan, sizes: dict[Place, Size]) -> None:
    """Raises: ConfigError when a batch is larger than the data can be."""
    for index, train in enumerate(plan.config.saes):
        place: Place = (plan.config.trained_on(train).hook_point or "", "train")
        most = sizes[place].most_rows if place in sizes else None
        if most is not None and train.batch_rows > most:
            what = f"the set {place[0]!r} has {most} training rows"
            if plan.subject is not None:
                what = f"the corpus has at most {most} training tokens"
            raise ConfigError(f"saes.{index}.batch_rows: {train.batch_rows}, but {what}. Lower it, or give more data.")


def check_devices(execution: ExecutionConfig) -> None:
    """Raises: ConfigError, as `check_gpus`, of this machine. The machines of a cluster have other GPUs."""
    if execution.runner == "ray":
        return
    mesh, nodes = execution.mesh, execution.nodes
    elsewhere = bool(nodes) and all(node.command for node in nodes)
    check_gpus(execution.device, 0 if mesh.world == 1 or elsewhere else mesh.world // max(1, len(nodes)))


def check_explainer(plan: Plan) -> None:
    """Raises: InputError when labels are still to be made and the key for them is not in the environment."""
    labels = plan.config.labels
    if labels is None or not isinstance(labels.explainer, ChatEndpoint):
        return
    storage = Storage(plan.config.execution.root)
    if not all(_is_stored(storage, spec.ref) for spec in plan.labels):
        read_key(labels.explainer)


def check_tokens(storage: Storage, plan: Plan) -> None:
    """What is known once the corpus is tokenized. A request for more tokens than there are is a warning.

    Raises: InputError when no context is held out; ConfigError when a batch is larger than the data.
    """
    activations = plan.config.activations
    if not isinstance(activations, ActivationsConfig):
        return
    metrics = [require_record(storage, spec.ref).metrics for spec in plan.tokens]
    n_train = sum(m["train"]["n_tokens"] for m in metrics)
    wants_heldout = any(split == "heldout" for _, split in plan.parts)
    if wants_heldout and not any(m["heldout"]["n_contexts"] for m in metrics):
        raise InputError(_no_heldout(plan, "the held-out text fills no context"))
    for index, train in enumerate(plan.config.saes):
        if train.batch_rows > n_train:
            raise ConfigError(
                f"saes.{index}.batch_rows: {train.batch_rows}, but the corpus has {n_train} training tokens. "
                f"Lower it, or add text to corpus.segments."
            )
    if activations.n_tokens is not None and activations.n_tokens > n_train:
        logger.warning(
            "activations.n_tokens: %s asked for, the corpus has %s training tokens; all of them are used",
            f"{activations.n_tokens:,}",
            f"{n_train:,}",
        )


def _given_sizes(plan: Plan, storage: Storage) -> dict[Place, Size]:
    given = plan.config.activations
    assert isinstance(given, GivenActivations)
    sizes: dict[Place, Size] = {}
    for name in given.sets:
        specs = [spec for (held, _), (spec, *_) in plan.parts.items() if held == name]
        if all(_is_stored(storage, spec.ref) for spec in specs):
            continue  # imported before: found to be good then
        spec = specs[0]
        assert isinstance(spec, GivenPartsSpec)
        n_train, n_heldout, d_in = measure_given(spec, f"activations.sets.{name}")
        itemsize = stored_dtype(spec.dtype).itemsize
        splits: list[tuple[Split, int]] = [("train", n_train), ("heldout", n_heldout)]
        for split, n_rows in splits:
            sizes[name, split] = Size(n_rows, n_rows, d_in, itemsize)
    return sizes


def _model_sizes(plan: Plan) -> dict[Place, Size]:
    corpus, activations = plan.config.corpus, plan.config.activations
    assert plan.subject
    assert corpus
    assert isinstance(activations, ActivationsConfig)
    _check_text(plan)
    syntax = any(spec.syntax for spec in plan.tokens)
    widths = check_subject(plan.subject, plan.config.hook_points, corpus.context_tokens, syntax=syntax).widths
    itemsize = stored_dtype(activations.dtype).itemsize
    wanted = {"train": activations.n_tokens, "heldout": activations.n_heldout_tokens}
    sizes: dict[Place, Size] = {}
    for place in plan.parts:
        hook_point, split = place
        n_rows = wanted[split]
        if None not in plan.tallies:
            n_bytes = sum(text_bytes(tally, split) for tally in plan.tallies if tally)
            n_rows = min(n_rows or n_bytes, n_bytes // BYTES_PER_TOKEN)
        sizes[place] = Size(_most_tokens(plan, split), n_rows, widths[hook_point], itemsize)
    return sizes


def _check_text(plan: Plan) -> None:
    """Raises: InputError when a split cannot have a context, or the text cannot have the vocabulary."""
    corpus = plan.config.corpus
    assert corpus
    width = corpus.context_tokens
    # What is packed is cut into full contexts; otherwise each document makes one.
    least = width if corpus.packing else 1
    for index, tally in enumerate(plan.tallies):
        if tally is None:
            continue
        if tally.n_documents == tally.n_heldout or _most_of(tally, "train") < least:
            raise InputError(
                f"corpus.segments.{index}: at most {_most_of(tally, 'train')} training tokens in "
                f"{tally.n_documents - tally.n_heldout} of {tally.n_documents} documents, less than one context of "
                f"{width}. Add text, or lower corpus.context_tokens or corpus.heldout_fraction."
            )
        if not corpus.packing:
            check_fits(
                9 * width * tally.n_documents,
                f"corpus.packing = false: {tally.n_documents} documents, each padded to {width} tokens,",
                "Lower corpus.context_tokens, or pack.",
            )
    known = [tally for tally in plan.tallies if tally is not None]
    if corpus.heldout_fraction > 0 and len(known) == len(plan.tallies):
        if not any(tally.n_heldout for tally in known):
            raise InputError(_no_heldout(plan, f"none of the {sum(t.n_documents for t in known)} documents is"))
        if all(_most_of(tally, "heldout") < least for tally in known):
            raise InputError(_no_heldout(plan, f"the held-out text is less than one context of {width} tokens"))
    subject = plan.config.subject
    first = plan.tallies[0]
    n_bytes = text_bytes(first, "train") if first is not None else None
    if isinstance(subject, EmbeddedLM) and n_bytes is not None and subject.vocab_size > ALPHABET + n_bytes:
        raise InputError(
            f"subject.vocab_size: {subject.vocab_size} tokens cannot come from {n_bytes} bytes of training text. "
            f"Lower it, or add text to corpus.segments."
        )


def check_training_memory(plan: Plan, sizes: dict[Place, Size]) -> None:
    """Raises: ConfigError when SAEs that train side by side, or parts that are remixed, cannot fit into memory."""
    together: dict[tuple[str, int], tuple[int, list[str]]] = {}
    mesh, n_nodes = plan.config.execution.mesh, max(1, len(plan.config.execution.nodes))
    for index, spec in enumerate(plan.saes):
        train, sae = spec.config, spec.config.sae
        size = sizes.get((train.hook_point or "", "train"))
        d_in = (size.d_in if size else None) or 1
        mean_bytes = 0 if train.ema_decay is None else 4
        n_bytes = (TRAINING_BYTES + mean_bytes) * 2 * sae.d_sae * d_in + (
            STATISTICS_BYTES + 8 * min(train.batch_rows // mesh.data, TILE_ROWS)
        ) * sae.d_sae
        # A machine has its share of the ranks, and each data rank a share of the latents of its own.
        n_bytes = n_bytes * mesh.data // n_nodes
        what = f"saes.{index} (d_sae = {sae.d_sae}, d_in = {size.d_in if size and size.d_in else 'unknown'})"
        before, names = together.get((spec.snapshot, train.batch_rows), (0, []))
        together[spec.snapshot, train.batch_rows] = before + n_bytes, [*names, what]
    for n_bytes, names in together.values():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more, trained side by side," if len(names) > 3 else "")
        check_fits(n_bytes, f"{shown}: training", "Lower d_sae, or train fewer at once.")
    n_tasks = plan.config.execution.max_workers
    for name, (remix, _) in plan.remixed.items():
        size = sizes.get((name, "train"))
        n_bytes = _rows_and_bytes(size, plan.snapshots[name, "train"])[1] if size else 0
        what = f"activations.remix.part_bytes: {readable(remix.part_bytes)} for each of {n_tasks} tasks"
        check_fits(min(n_bytes, n_tasks * remix.part_bytes), what, "Lower it, or execution.max_workers.")


def check_disk(plan: Plan, sizes: dict[Place, Size]) -> None:
    """Raises: ConfigError when the root's disk has less room than what is still to be written takes, about."""
    storage = Storage(plan.config.execution.root)
    free = storage.free_bytes()
    if free is None:
        return
    needed, largest = 0, (0, "")
    for each in [plan] + ([plan.control] if plan.control else []):
        for place, snapshot in each.snapshots.items():
            size = sizes.get(place)
            if size is None or not size.n_rows or not size.d_in or _is_stored(storage, snapshot.ref):
                continue
            n_rows, n_bytes = _rows_and_bytes(size, snapshot)
            for spec in each.parts[place]:
                done = sum(name.startswith("part-") and name.endswith(".json") for name in storage.list(spec.ref))
                n_bytes -= done * spec.part_bytes
            n_bytes = max(n_bytes, 0)
            needed += n_bytes
            largest = max(largest, (n_bytes, f"{n_rows:,} x {size.d_in} activations of {place[0]}"))
    for sae in plan.saes:
        size = sizes.get((sae.config.hook_point or "", "train"))
        if size and size.d_in and not _is_stored(storage, sae.ref):
            # Weights, and beside them a checkpoint with Adam's moments.
            needed += 4 * 4 * 2 * sae.config.sae.d_sae * size.d_in
    needed += _remix_bytes(plan, storage, sizes)
    if needed > free:
        raise ConfigError(
            f"root {storage.root!r} has {readable(free)} free, the run needs about {readable(needed)}"
            f"{f' ({readable(largest[0])} for {largest[1]})' if largest[0] else ''}. Free some, lower "
            f"activations.n_tokens, or choose another with --root."
        )


def _remix_bytes(plan: Plan, storage: Storage, sizes: dict[Place, Size]) -> int:
    """What remixes still take: another copy of the training rows each and, while one is made, a third."""
    copies = [0]
    for each in [plan] + ([plan.control] if plan.control else []):
        for name, (_, remixed) in each.remixed.items():
            source, size = each.snapshots[name, "train"], sizes.get((name, "train"))
            if _is_stored(storage, remixed.ref):
                continue
            if _is_stored(storage, source.ref):
                copies.append(int(require_record(storage, source.ref).metrics["n_bytes"]))
            elif size is not None:
                copies.append(_rows_and_bytes(size, source)[1])
    return sum(copies) + max(copies)


def _rows_and_bytes(size: Size, snapshot: SnapshotSpec) -> tuple[int, int]:
    """About how much a snapshot of activations of this size holds; 0 when it is not known."""
    n_rows = min(size.n_rows or 0, snapshot.n_tokens or size.n_rows or 0)
    return n_rows, n_rows * ((size.d_in or 0) * size.itemsize + IDENTITY_BYTES)


def _most_tokens(plan: Plan, split: Split) -> int | None:
    """No tokenizer makes more tokens than this of the text of a split."""
    if None in plan.tallies:
        return None
    return sum(_most_of(tally, split) for tally in plan.tallies if tally)


def _most_of(tally: Tally, split: Split) -> int:
    """A token for every byte, a separator and a prefix for every document."""
    n_documents = tally.n_heldout if split == "heldout" else tally.n_documents - tally.n_heldout
    return text_bytes(tally, split) + 2 * n_documents


def text_bytes(tally: Tally, split: Split) -> int:
    """Bytes of the text of a split."""
    return tally.n_heldout_bytes if split == "heldout" else tally.n_bytes - tally.n_heldout_bytes


def _is_stored(storage: Storage, ref: str) -> bool:
    return storage.exists(layout.record_path(ref))


def _no_heldout(plan: Plan, why: str) -> str:
    assert plan.config.corpus
    return (
        f"corpus.heldout_fraction: {plan.config.corpus.heldout_fraction} holds nothing out: {why} (a hash of each "
        f"document's name decides). Raise it, set it to 0 to evaluate on training text, or add documents."
    )
