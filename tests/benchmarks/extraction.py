"""Extraction of parts against the bare hooked forward over the same batches, for one, two and four hook points.

And against what they cost apart: one forward pass, plus the writes of as many hook points without a forward pass. A
row says how fast it is while the model runs: when it is done the last part is still to be written, however long the
extraction was.

Beside it the least that an extraction must do, by bare calls in two threads beside the model's: copy as float16,
permute, CRC-32, xxh3, write, fsync; no norms, no sums, no record. Both by CPU time, too, which says what is left where
no core is to spare.
"""

import contextlib
import functools
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from zlib_ng.zlib_ng import crc32

from sae.extract.config import PartsSpec, TokensSpec
from sae.extract.part import extract_parts, plan_parts
from sae.store.artefacts.records import commit
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import Contexts, read_contexts, write_contexts
from sae.subject.config import EmbeddedLM
from sae.subject.embedded import new_model
from sae.subject.hooks import Reader, capture
from sae.subject.load import Subject
from tests.benchmarks.timing import Row

CONTEXT_TOKENS, VOCAB_SIZE = 128, 2048
NOWHERE = "0" * 16
EMBEDDED = ("mlp.act", "mlp.dense_h_to_4h", "attention.dense", "mlp.dense_h_to_4h:input")
"""512, 512, 128 and 128 wide; the first is the default recipe's, and the last that is computed."""
N_ROUNDS = 5


def extraction(folder: Path) -> Iterator[Row]:
    """Tokens/s: forward, copy, filter, permute, write, hash and commit, over the forward alone."""
    threads = torch.get_num_threads()
    embedded = new_model(EmbeddedLM(), VOCAB_SIZE, CONTEXT_TOKENS, seed=0)
    points = [f"gpt_neox.layers.0.{name}" for name in EMBEDDED]
    for n_threads in sorted({1, threads}):
        torch.set_num_threads(n_threads)
        what = f"embedded, threads: {n_threads}"
        # The default recipe's size: 16 parts of 64 MiB of the first hook point.
        yield from _measure(folder / f"embedded-{n_threads}", what, embedded, points, 8192, 32, 64 << 20)
    torch.set_num_threads(threads)
    points = [f"gpt_neox.layers.{layer}" for layer in (5, 4, 3, 2)]
    yield from _measure(folder / "six-layers", f"6 x 512, threads: {threads}", _six_layers(), points, 64, 8, 1 << 21)


def _measure(
    folder: Path, what: str, model: Any, points: list[str], n_contexts: int, batch_contexts: int, part_bytes: int
) -> Iterator[Row]:
    """Bare forward, extraction, and writes without a forward, in turn; every round writes new part sets."""
    storage = Storage(str(folder))
    tokens = _tokens(storage, n_contexts)
    subject = Subject(model.eval().requires_grad_(False), tokenizer=None, special_ids=(0,), causal=True)
    seeds = itertools.count()
    model_done = [0.0]

    def note(*_: object) -> None:
        model_done[0] = time.perf_counter()

    batches = torch.tensor(read_contexts(storage, tokens.ref, "train").tokens, dtype=torch.int64).split(batch_contexts)

    def planned(n_points: int) -> Callable[[], object]:
        shutil.rmtree(folder / PartsSpec.stage, ignore_errors=True)  # what was timed before
        seed = next(seeds)
        specs = [_parts(tokens, point, batch_contexts, part_bytes, seed) for point in points[:n_points]]
        parts = [range(plan_parts(storage, spec, subject=subject).metrics["n_parts"]) for spec in specs]
        return lambda: extract_parts(storage, specs, parts, subject=subject, progress=note)

    def bare() -> None:
        with torch.no_grad(), capture(model, points[:1]) as read:
            for batch in batches:
                read(batch)

    with torch.no_grad(), capture(model, points) as read:
        recorded = read(batches[0])
    d_in = recorded[points[0]].shape[-1]
    buffers = torch.zeros((2, part_bytes // (2 * d_in), d_in), dtype=torch.float16)
    order = np.random.default_rng(0).permutation(buffers.shape[1])

    def least() -> None:
        n_held, turns = 0, itertools.cycle(buffers)
        held, put, written = next(turns), _done(), _done()

        def write(part: Tensor, last: Future[object]) -> None:
            last.result()
            _write_bare(folder / "bare", part, order)

        one_thread = functools.partial(ThreadPoolExecutor, 1, initializer=torch.set_num_threads, initargs=(1,))
        with one_thread() as holding, one_thread() as writing, torch.no_grad(), capture(model, points[:1]) as read:
            for batch in batches:
                act = read(batch)[points[0]].flatten(0, 1)
                put.result()
                put = holding.submit(held[n_held : n_held + len(act)].copy_, act)
                n_held += len(act)
                if n_held == len(held):
                    written.result()
                    written = writing.submit(write, held, put)
                    held, n_held = next(turns), 0
            written.result()

    extracted: dict[int, list[float]] = {0: [], 1: [], 2: [], 4: []}
    running: list[float] = []
    bare_calls: list[float] = []
    written: dict[int, list[float]] = {2: [], 4: []}
    processor: dict[str, list[float]] = {"bare": [], "ours": [], "least": []}
    for _ in range(N_ROUNDS + 1):
        for n_points, spent in extracted.items():
            spent.append(_seconds(planned(n_points) if n_points else bare))
            if n_points == 1:
                running.append(spent[-1] - (time.perf_counter() - model_done[0]))
        bare_calls.append(_seconds(least))
        for n_points, spent in written.items():
            call = planned(n_points)
            with mock.patch("sae.extract.part.capture", _replay(recorded)):
                spent.append(_seconds(call))
        for name, call in {"bare": bare, "ours": planned(1), "least": least}.items():
            processor[name].append(_seconds(call, time.process_time))
    n_tokens = n_contexts * CONTEXT_TOKENS

    def row(name: str, ours: Sequence[float], reference: Sequence[float]) -> Row:
        pairs = list(zip(ours, reference, strict=True))[1:]  # the first round warms up
        speeds = (f"{n_tokens / statistics.median(column):,.0f} tokens/s" for column in zip(*pairs, strict=True))
        return Row(f"extraction, {what}, {name}", *speeds, tuple(theirs / mine for mine, theirs in pairs))

    yield row("hook points: 1, while the model runs", running, extracted[0])
    yield row("the least", bare_calls, extracted[0])
    for n_points in (1, 2, 4):
        yield row(f"hook points: {n_points}", extracted[n_points], extracted[0])
    for n_points, alone in written.items():
        apart = [sum(times) for times in zip(extracted[0], alone, strict=True)]
        yield row(f"{n_points} / forward + {n_points} writes", extracted[n_points], apart)
    yield row("hook points: 1, CPU time", processor["ours"], processor["bare"])
    yield row("the least, CPU time", processor["least"], processor["bare"])


def _seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    os.sync()  # what was written before must not be paid for now
    started = clock()
    call()
    return clock() - started


def _done() -> Future[object]:
    future: Future[object] = Future()
    future.set_result(None)
    return future


def _write_bare(path: Path, held: Tensor, order: np.ndarray) -> None:
    """Rows of float16 in another order, hashed twice, to a durable file."""
    rows = held.numpy().view(f"V{2 * held.shape[1]}")[:, 0]
    block = np.empty((1 << 20) // rows.itemsize, rows.dtype)
    crc, xxh3 = 0, xxhash.xxh3_64()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(order), len(block)):
        some = order[start : start + len(block)]
        data = np.take(rows, some, out=block[: len(some)], mode="clip").view(np.uint8).data
        crc = crc32(data, crc)
        xxh3.update(data)
        os.write(descriptor, data)
    os.fsync(descriptor)
    os.close(descriptor)


def _replay(recorded: dict[str, Tensor]) -> Callable[..., contextlib.AbstractContextManager[Reader]]:
    """In place of `capture`: activations at no cost, the same for every batch."""

    @contextlib.contextmanager
    def replay(_model: Any, names: Sequence[str]) -> Iterator[Reader]:
        yield lambda *_: {name: recorded[name] for name in names}

    return replay


def _six_layers() -> Any:
    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    return GPTNeoXForCausalLM(config)


def _tokens(storage: Storage, n_contexts: int) -> TokensSpec:
    """Commit random contexts; one token in a hundred is special."""
    spec = TokensSpec(
        segment=f"segments/{NOWHERE}",
        tokenizer=f"tokenizers/{NOWHERE}",
        context_tokens=CONTEXT_TOKENS,
        packing=True,
        syntax=False,
        seed=0,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB_SIZE, (n_contexts, CONTEXT_TOKENS), np.int32)
    tokens[rng.random(tokens.shape) < 0.01] = 0
    metrics = {
        "train": {"n_contexts": n_contexts},
        "context_tokens": CONTEXT_TOKENS,
        "special_ids": [0],
        "pad_id": None,
        "vocab_size": VOCAB_SIZE,
    }
    with storage.staging() as folder:
        seq = np.arange(n_contexts, dtype=np.int32)
        write_contexts(folder / "train.parquet", Contexts(seq, tokens, np.zeros_like(tokens), labels=None))
        commit(storage, spec, folder, metrics, seconds=0.0)
    return spec


def _parts(tokens: TokensSpec, hook_point: str, batch_contexts: int, part_bytes: int, seed: int) -> PartsSpec:
    return PartsSpec(
        tokens=tokens.ref,
        subject=f"subjects/{NOWHERE}",
        split="train",
        hook_point=hook_point,
        dtype="float16",
        part_bytes=part_bytes,
        row_group_bytes=part_bytes // 16,
        batch_contexts=batch_contexts,
        keep_special=False,
        max_norm_multiple=10.0,
        seed=seed,
    )
