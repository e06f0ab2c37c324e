"""From contexts to activations: one part of the store, for all its hook points in one forward pass."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae.errors import ConfigError, InputError
from sae.extract.config import PartsSpec
from sae.extract.write import FLOAT16_MAX, write_rows
from sae.progress import Progress, silent
from sae.store.contexts import PADDING, Contexts, read_contexts
from sae.store.encoding import Encoding, stored_dtype
from sae.store.filesystem import Storage
from sae.store.order import philox
from sae.store.records import Record, commit, require_record
from sae.store.snapshot import PART_FILE
from sae.subject.hooks import Reader, capture, check_hook_points, hook_width
from sae.subject.load import Subject, check_context, load_subject


@dataclass(frozen=True)
class _Batches:
    """The contexts of a part, as they go through the model."""

    part: int
    contexts: Contexts
    keep: np.ndarray
    """Which positions are stored. [n, T] bool"""
    batch_contexts: int
    masked: bool
    """Whether contexts are padded, so that attention needs a mask."""


def plan_parts(storage: Storage, spec: PartsSpec, *, subject: Subject | None = None) -> Record:
    """Commit how a split's contexts are cut into parts. No activation is stored yet.

    Args:
        subject: the loaded model of `spec.subject`, to load it once for many specs.

    Raises: InputError when the model lacks the hook point or cannot take these contexts.
    """
    started = time.perf_counter()
    subject = subject or load_subject(storage, spec.subject)
    tokens = require_record(storage, spec.tokens).metrics
    _check_fits(subject, tokens, spec)
    d_in = hook_width(subject.model, spec.hook_point)
    row_bytes = d_in * stored_dtype(spec.dtype).itemsize
    n_contexts = int(tokens[spec.split]["n_contexts"])
    contexts_per_part = max(1, spec.part_bytes // (tokens["context_tokens"] * row_bytes))
    metrics = {
        "d_in": d_in,
        "n_parts": -(-n_contexts // contexts_per_part),
        "n_contexts": n_contexts,
        "contexts_per_part": contexts_per_part,
        "tokens_per_part": contexts_per_part * tokens["context_tokens"],
        "row_group_rows": max(1, spec.row_group_bytes // row_bytes),
    }
    with storage.staging() as folder:
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def extract_part(
    storage: Storage,
    specs: Sequence[PartsSpec],
    part: int,
    *,
    subject: Subject | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> list[Record]:
    """Write part number `part` of several hook points, read in one forward pass per batch of contexts.

    Special tokens (unless `keep_special`) and padding are left out and counted; rows are permuted within the part.

    Args:
        specs: equal but for their hook points, and with equally many contexts per part (their plans say how many).
        subject: the loaded model, to load it once for many parts.
        device: where the model runs when it is loaded here.

    Returns: one record per spec.
    Raises:
        ConfigError: the specs differ in more than their hook points, or their parts hold other contexts.
        InputError: activations that are not finite or too large for float16; the message says where.
    """
    started = time.perf_counter()
    plans = [require_record(storage, spec.ref).metrics for spec in specs]
    _check_alike(specs, plans, part)
    first = specs[0]
    n_contexts = plans[0]["contexts_per_part"]
    contexts = read_contexts(storage, first.tokens, first.split, part * n_contexts, (part + 1) * n_contexts)
    tokens = require_record(storage, first.tokens).metrics
    present = contexts.docs != PADDING
    is_special = present & np.isin(contexts.tokens, tokens["special_ids"])
    keep = present if first.keep_special else present & ~is_special
    context, pos = np.nonzero(keep)
    if len(pos) == 0:
        raise InputError(
            f"{first.ref}, part {part}: all its {contexts.tokens.size} tokens are special or padding. Raise "
            f"activations.part_bytes, or set activations.keep_special."
        )
    # Row i of the contexts is stored at destination[i].
    key = (first.seed, part, first.tokens, first.split)
    destination = philox("rows", *key).permutation(len(pos))
    subject = subject or load_subject(storage, first.subject, device)
    check_hook_points(subject.model, [spec.hook_point for spec in specs])
    acts = {
        spec.hook_point: np.empty((len(pos), plan["d_in"]), spec.dtype) for spec, plan in zip(specs, plans, strict=True)
    }
    batches = _Batches(part, contexts, keep, first.batch_contexts, masked=tokens["pad_id"] is not None)
    with torch.no_grad(), capture(subject.model, list(acts)) as read:
        _fill(acts, destination, batches, read, subject.model.device, progress)

    identity = np.empty((3, len(pos)), np.int32)
    identity[:, destination] = contexts.seq[context], pos, contexts.tokens[keep]
    counts = {
        "n_contexts": len(contexts),
        "n_special": int(is_special.sum()),
        "n_padding": int((~present).sum()),
    }
    seconds = (time.perf_counter() - started) / len(specs)
    records = []
    for spec, plan in zip(specs, plans, strict=True):
        writing = time.perf_counter()
        act = acts.pop(spec.hook_point)
        with storage.staging() as folder:
            metrics = (
                write_rows(folder / PART_FILE, act, identity, plan["row_group_rows"], Encoding(dtype=spec.dtype))
                | counts
            )
            spent = seconds + time.perf_counter() - writing
            records.append(commit(storage, spec, folder, metrics, seconds=spent, part=part))
    return records


def _fill(
    acts: dict[str, np.ndarray],
    destination: np.ndarray,
    batches: _Batches,
    read: Reader,
    device: torch.device,
    progress: Progress,
) -> None:
    """Run the model and put every kept activation at its destination row of `acts`, in place."""
    contexts, size = batches.contexts, batches.batch_contexts
    stored = {name: torch.from_numpy(act) for name, act in acts.items()}
    destination_rows = torch.from_numpy(destination)
    n_done = 0
    for start in range(0, len(contexts), size):
        batch = slice(start, start + size)
        tokens = torch.from_numpy(contexts.tokens[batch].astype(np.int64)).to(device)
        mask = torch.from_numpy(contexts.docs[batch] != PADDING).long().to(device) if batches.masked else None
        keep = torch.from_numpy(batches.keep[batch]).to(device)
        n_rows = int(keep.sum())
        rows = destination_rows[n_done : n_done + n_rows]
        for name, act in read(tokens, mask).items():
            kept = act[keep]
            _check_storable(f"hook point {name!r}, part {batches.part}", kept, act, keep, contexts.seq[batch])
            stored[name].index_copy_(0, rows, kept.to(stored[name].dtype).cpu())
        n_done += n_rows
        progress(n_done, len(destination), "tokens")


def _check_storable(what: str, kept: torch.Tensor, act: torch.Tensor, keep: torch.Tensor, seq: np.ndarray) -> None:
    if kept.numel() == 0:
        return
    low, high = torch.aminmax(kept)  # NaN if any value is
    if low.item() >= -FLOAT16_MAX and high.item() <= FLOAT16_MAX:
        return
    bad = keep & ~(act.abs().amax(-1) <= FLOAT16_MAX)
    context, pos = (int(index) for index in bad.nonzero()[0])
    vector = act[context, pos].float()
    where = f"{what}, context {int(seq[context])}, position {pos}"
    if not torch.isfinite(vector).all():
        raise InputError(
            f"{where}: {int((~torch.isfinite(vector)).sum())} of {len(vector)} activations are NaN or infinite. "
            f"With subject.dtype float16 the model itself overflows: choose bfloat16 or float32."
        )
    raise InputError(
        f"{where}: an activation of {float(vector.abs().max()):.6g} does not fit float16 (up to 65504). Choose a hook "
        f"point before the value grows, such as a layer's '.mlp' or '.attention' output."
    )


def _check_alike(specs: Sequence[PartsSpec], plans: Sequence[dict[str, Any]], part: int) -> None:
    if not specs:
        raise ConfigError("extract_part needs at least one hook point")
    first = specs[0].model_dump(exclude={"hook_point"})
    for spec, plan in zip(specs, plans, strict=True):
        if spec.model_dump(exclude={"hook_point"}) != first:
            raise ConfigError(
                f"{spec.ref} and {specs[0].ref} differ in more than their hook points: extract them apart"
            )
        if plan["contexts_per_part"] != plans[0]["contexts_per_part"]:
            raise ConfigError(
                f"{spec.hook_point} has {plan['contexts_per_part']} contexts per part, {specs[0].hook_point} "
                f"{plans[0]['contexts_per_part']}, because their widths differ: extract them apart"
            )
    if not 0 <= part < plans[0]["n_parts"]:
        raise ConfigError(f"{specs[0].ref}: no part {part}, it has {plans[0]['n_parts']}")


def _check_fits(subject: Subject, tokens: dict[str, Any], spec: PartsSpec) -> None:
    check_context(subject.model.config, tokens["context_tokens"], spec.subject)
    n_embeddings = subject.model.get_input_embeddings().weight.shape[0]
    if tokens["vocab_size"] > n_embeddings:
        raise InputError(
            f"{spec.tokens}: its tokenizer has {tokens['vocab_size']} tokens, the model {spec.subject} embeddings for "
            f"{n_embeddings}. They do not belong together."
        )
