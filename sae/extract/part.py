"""From contexts to activations: parts of the store, of all hook points in one forward pass.

Three things go on at once: the model runs over a batch of contexts; the activations of the batch before are cast and
held; the rows of the part before are picked in their stored order, hashed, written and committed. The model has the
caller's thread and torch's, the others have threads of their own. On a GPU the copies to the host have a stream of
their own, too, into page-locked memory: the GPU makes them while it computes.
"""

import contextlib
import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import ConfigError, InputError
from sae.extract.config import PartsSpec
from sae.extract.filters import dropped_ids
from sae.extract.stream import PartStream, SharedRows, helper_threads
from sae.progress import Progress, silent
from sae.store.artefacts.records import Record, commit, require_record
from sae.store.part.encoding import stored_dtype
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import CONTEXTS_PER_ROW_GROUP, PADDING, Contexts, read_contexts
from sae.subject.hooks import capture, check_hook_points, hook_width
from sae.subject.load import Subject, check_context, load_subject

KEPT_BYTES = (1 << 25) - (1 << 13)
"""As large as a block can be (32 MiB with its head) for glibc's allocator to take its size as usual."""
READ_TOGETHER = ("tokens", "subject", "split", "batch_contexts")
"""Fields of a spec that decide which forward passes its activations come from."""


def plan_parts(storage: Storage, spec: PartsSpec, *, subject: Subject | None = None) -> Record:
    """Commit how a split's contexts are cut into parts. No activation is stored yet.

    Args:
        subject: the loaded model of `spec.subject`, to load it once for many specs.

    Raises: InputError when the model lacks the hook point, cannot take these contexts, or its tokenizer has no special
        token of a name in `keep_special`.
    """
    started = time.perf_counter()
    subject = subject or load_subject(storage, spec.subject)
    tokens = require_record(storage, spec.tokens).metrics
    _check_fits(subject, tokens, spec)
    d_in = hook_width(subject.model, spec.hook_point)
    row_bytes = d_in * stored_dtype(spec.dtype).itemsize
    n_contexts = int(tokens[spec.split]["n_contexts"])
    per_part = contexts_per_part(spec, tokens["context_tokens"], d_in)
    metrics = {
        "d_in": d_in,
        "n_parts": -(-n_contexts // per_part),
        "n_contexts": n_contexts,
        "contexts_per_part": per_part,
        "tokens_per_part": per_part * tokens["context_tokens"],
        "row_group_rows": max(1, spec.row_group_bytes // row_bytes),
        "dropped_ids": dropped_ids(subject.tokenizer, tokens["special_ids"], spec.keep_special),
    }
    with storage.staging() as folder:
        return commit(storage, spec, folder, metrics, seconds=time.perf_counter() - started)


def contexts_per_part(spec: PartsSpec, context_tokens: int, d_in: int) -> int:
    """A power of two of batches, of no more bytes than asked for unless one batch has more.

    So the parts of a wide hook point lie within those of a narrow one and share their forward passes, although neither
    knows of the other.
    """
    n_batches = spec.part_bytes // (context_tokens * d_in * stored_dtype(spec.dtype).itemsize * spec.batch_contexts)
    return spec.batch_contexts << max(0, n_batches.bit_length() - 1)


def extract_part(
    storage: Storage,
    specs: Sequence[PartsSpec],
    part: int,
    *,
    subject: Subject | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> list[Record]:
    """Compute and commit part number `part` of several hook points, whatever the store holds.

    Returns: one record per spec.
    Raises: as extract_parts.
    """
    options: dict[str, Any] = {"recompute": True, "subject": subject, "device": device, "progress": progress}
    return [record for (record,) in extract_parts(storage, specs, [[part]] * len(specs), **options)]


def extract_parts(
    storage: Storage,
    specs: Sequence[PartsSpec],
    parts: Sequence[Sequence[int]],
    *,
    recompute: bool = False,
    subject: Subject | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> list[list[Record]]:
    """Compute parts of several hook points, in one forward pass per batch of contexts, and commit each as it is full.

    Padding, special tokens (unless `keep_special`) and rows above `max_norm_multiple` are left out and counted; rows
    are permuted within the part. The bytes of a part depend on its spec alone, not on what is extracted with it.

    Memory: two parts of each spec, and two batches of activations.

    Args:
        specs: of the same tokens, subject, split and batch size; hook points, dtypes and sizes of parts may differ.
        parts: the numbers wanted of each spec. Those on the same contexts share their forward passes.
        recompute: compute finished parts too; their bytes must come out the same. Otherwise each is looked for when
            its turn comes, because other processes may be at work on the same parts.
        subject: the loaded model, to load it once for many calls.
        device: where the model runs when it is loaded here.

    Returns: for each spec one record per part, in the order of `parts`.
    Raises:
        ConfigError: the specs need other forward passes, or have no such part.
        InputError: activations that are not finite, or too large for their dtype; the message says where.
    """
    plans = [require_record(storage, spec.ref).metrics for spec in specs]
    _check_alike(specs, plans, parts)
    with helper_threads() as (putting, writing):
        device = torch.device(device) if subject is None else subject.model.device
        streams = [
            PartStream(storage, spec, plan, numbers, writing, recompute, device)
            for spec, plan, numbers in zip(specs, plans, parts, strict=True)
        ]
        window = _Window(storage, specs[0])
        batches = _batches(streams, specs[0].batch_contexts, window)
        if (first := next(batches, None)) is not None:  # or no model is needed
            subject = subject or load_subject(storage, specs[0].subject, device)
            _run(subject.model, streams, itertools.chain([first], batches), putting, progress)
        records = [stream.records() for stream in streams]
    return [[found[part] for part in numbers] for found, numbers in zip(records, parts, strict=True)]


class _Batch(NamedTuple):
    """Contexts that go through the model together."""

    start: int
    """Number of the first."""
    ahead: Contexts
    """Those from `start` to where the last of the parts that they belong to ends."""
    tokens: Tensor
    """What the model reads. [contexts, T] int64"""
    mask: Tensor | None
    """Which tokens are no padding, where contexts have any. [contexts, T] int64"""
    tokens_done: int
    """When this batch is."""
    tokens_total: int


def _batches(streams: Sequence[PartStream], size: int, window: "_Window") -> Iterator[_Batch]:
    """The batches to compute, in order. Whether a part is finished by now is asked when its turn comes."""
    starts = sorted({start for stream in streams for start in stream.batch_starts(size)})
    done, total = 0, sum(window.count(start, start + size) for start in starts)
    for start in starts:
        done += window.count(start, start + size)
        wanted = [stream.wants(start) for stream in streams]
        if any(wanted):
            ahead = window.read(start, max(start + size, *(stream.stop_at(start) for stream in streams)))
            tokens = torch.from_numpy(ahead.tokens[:size].astype(np.int64))
            mask = torch.from_numpy(ahead.docs[:size] != PADDING).long() if window.is_padded else None
            yield _Batch(start, ahead, tokens, mask, done, total)


def _run(
    model: Any, streams: Sequence[PartStream], batches: Iterator[_Batch], putting: Executor, progress: Progress
) -> None:
    """The forward passes. While the model runs over a batch, the one before is put in its places and the next is read.

    Nothing but the model is left to the caller's thread: where a batch takes milliseconds, all else is felt.
    """
    names = list(dict.fromkeys(stream.hook_point for stream in streams))
    check_hook_points(model, names)
    _keep_freed_memory()
    shared: SharedRows = weakref.WeakValueDictionary()
    device = model.device  # once: it is found by a walk through the modules
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(batch: _Batch, acts: dict[str, Tensor]) -> _Batch | None:
        """Returns: the batch after the next."""
        _put(streams, batch, acts, shared, copies)
        return next(batches, None)

    batch, work = next(batches, None), putting.submit(next, batches, None)
    with torch.no_grad(), capture(model, names) as read:
        while batch is not None:
            acts = read(batch.tokens.to(device), None if batch.mask is None else batch.mask.to(device))
            following = work.result()
            if copies:
                copies.wait_stream(torch.cuda.current_stream(device))
            work = putting.submit(put, batch, acts)
            del acts  # or these would be kept until the next ones are there
            progress(batch.tokens_done, batch.tokens_total, "tokens")
            batch = following
    work.result()


def _keep_freed_memory() -> None:
    """Let the process keep what a forward pass frees, for the next one, rather than give it back to the system.

    glibc's allocator maps blocks above a size one by one and gives back free memory above twice that size. Memory that
    comes anew from the system is zeroed a page at a time, which can take as long as the forward pass of a small model.
    Freeing one block raises that size (mallopt(3), M_MMAP_THRESHOLD); this one is never touched, so it costs nothing.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


def _put(
    streams: Sequence[PartStream],
    batch: _Batch,
    acts: dict[str, Tensor],
    shared: SharedRows,
    copies: torch.cuda.Stream | None,
) -> None:
    """copies: the stream of a GPU that the activations are taken by; it waits for what has made them."""
    with torch.cuda.stream(copies) if copies else contextlib.nullcontext():
        if copies:
            for act in acts.values():
                act.record_stream(copies)  # their memory is not used again while copies are made
        for stream in streams:
            stream.put(batch.start, batch.ahead, acts, shared)


class _Window:
    """The contexts of a split by their numbers; those around the ones asked for last are kept."""

    def __init__(self, storage: Storage, spec: PartsSpec) -> None:
        self._storage, self._spec = storage, spec
        metrics = require_record(storage, spec.tokens).metrics
        self._n_contexts = int(metrics[spec.split]["n_contexts"])
        self._context_tokens = int(metrics["context_tokens"])
        self.is_padded = metrics["pad_id"] is not None
        """Whether contexts end in padding, so that attention needs a mask."""
        self._first, self._kept = 0, read_contexts(storage, spec.tokens, spec.split, 0, 0)

    def count(self, start: int, stop: int) -> int:
        """Tokens of the contexts [start, stop), as many of them as there are."""
        return (min(stop, self._n_contexts) - start) * self._context_tokens

    def read(self, start: int, stop: int) -> Contexts:
        """The contexts [start, stop), as many of them as there are. Raises: as read_contexts."""
        stop = min(stop, self._n_contexts)
        if not self._first <= start <= stop <= self._first + len(self._kept):
            # Whole row groups, because what is read of one is decoded whole.
            self._first = start // CONTEXTS_PER_ROW_GROUP * CONTEXTS_PER_ROW_GROUP
            end = -(-stop // CONTEXTS_PER_ROW_GROUP) * CONTEXTS_PER_ROW_GROUP
            self._kept = read_contexts(self._storage, self._spec.tokens, self._spec.split, self._first, end)
        return self._kept[start - self._first : stop - self._first]


def _check_alike(specs: Sequence[PartsSpec], plans: Sequence[dict[str, Any]], parts: Sequence[Sequence[int]]) -> None:
    if not specs:
        raise ConfigError("extract_parts needs at least one hook point")
    for spec, plan, numbers in zip(specs, plans, parts, strict=True):
        for name in READ_TOGETHER:
            if getattr(spec, name) != getattr(specs[0], name):
                raise ConfigError(
                    f"{spec.ref} and {specs[0].ref} differ in {name} ({getattr(spec, name)!r}, "
                    f"{getattr(specs[0], name)!r}), so they share no forward pass: extract them apart"
                )
        for part in numbers:
            if not 0 <= part < plan["n_parts"]:
                raise ConfigError(f"{spec.ref}: no part {part}, it has {plan['n_parts']}")


def _check_fits(subject: Subject, tokens: dict[str, Any], spec: PartsSpec) -> None:
    check_context(subject.model.config, tokens["context_tokens"], spec.subject)
    n_embeddings = subject.model.get_input_embeddings().weight.shape[0]
    if tokens["vocab_size"] > n_embeddings:
        raise InputError(
            f"{spec.tokens}: its tokenizer has {tokens['vocab_size']} tokens, the model {spec.subject} embeddings for "
            f"{n_embeddings}. They do not belong together."
        )
