"""How fast this machine is at what a plan needs: a few batches, steps and megabytes, of which nothing is left."""

import contextlib
import itertools
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.device import wait_for
from sae.extract.config import ActivationsConfig, DatasetSource
from sae.extract.corpus import iter_documents
from sae.philox import philox
from sae.plan import Plan
from sae.progress import Progress, silent
from sae.store import layout
from sae.store.artefacts.checkpoints import Checkpoints, Position, new_attempt
from sae.store.artefacts.records import is_intact
from sae.store.storage.filesystem import Storage
from sae.store.text.contexts import PADDING, Contexts, read_contexts
from sae.subject.config import EmbeddedLMSpec, HFModelSpec
from sae.subject.embedded import new_model, train_model
from sae.subject.hooks import capture
from sae.subject.load import load_pinned, load_subject
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun

BATCHES, SECONDS = 8, 5.0
"""A probe ends after so many batches or steps, or after so long, one of them beside the first."""
STORAGE_BYTES = 32 << 20
STEPS = 5


class ForwardSpeed(NamedTuple):
    """Of the model up to its last hook point."""

    tokens_per_second: float
    model_bytes: int
    widths: dict[str, int]
    rho: dict[str, float] | None
    """Hook point -> correlation of two rows of a context; None without text to see it on."""


class StorageSpeed(NamedTuple):
    """Of the root, with one stream."""

    write_bytes_per_second: float
    read_bytes_per_second: float
    request_seconds: float
    """Of a small read."""


def probe_forward(
    plan: Plan, storage: Storage, progress: Progress = silent, device: torch.device | str = "cpu"
) -> ForwardSpeed:
    """Run a few batches of the plan's model through its hook points.

    The model is the real one where it exists; an embedded one that is still to be trained has random weights, which
    take as long. Text is real where it is tokenized already, or a tokenizer and text are at hand.
    """
    corpus, activations, subject = plan.config.corpus, plan.config.activations, plan.subject
    assert corpus
    assert isinstance(activations, ActivationsConfig)
    tokenizer = None
    if isinstance(subject, HFModelSpec):
        loaded = load_pinned(subject, device)
        model, tokenizer = loaded.model, loaded.tokenizer
    elif subject is not None and is_intact(storage, subject.ref):
        model = load_subject(storage, subject.ref, device).model
    else:
        assert isinstance(subject, EmbeddedLMSpec)
        model = new_model(subject.config, subject.config.vocab_size, corpus.context_tokens, plan.config.seed).to(device)
    shape = activations.batch_contexts, corpus.context_tokens
    tokens = _stored_text(plan, storage, shape)
    if tokens is None and tokenizer is not None:
        tokens = _read_text(plan, tokenizer, shape)
    is_text = tokens is not None
    if tokens is None:
        n_tokens = model.get_input_embeddings().weight.shape[0]
        tokens = torch.from_numpy(philox("probe", plan.config.seed).integers(0, n_tokens, shape))
    names = list(plan.config.hook_points)
    with torch.no_grad(), capture(model, names) as read:
        tokens = tokens.to(device)
        acts = read(tokens)
        widths = {name: int(act.shape[-1]) for name, act in acts.items()}
        rho = {name: context_correlation(act) for name, act in acts.items()} if is_text else None
        del acts
        seconds = _median_seconds(lambda: read(tokens), progress, "batches", device)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return ForwardSpeed(tokens.numel() / seconds, n_bytes, widths, rho)


def probe_subject_training(plan: Plan, progress: Progress = silent, device: torch.device | str = "cpu") -> float:
    """Seconds of a training step of the plan's embedded model."""
    subject, corpus = plan.subject, plan.config.corpus
    assert isinstance(subject, EmbeddedLMSpec)
    assert corpus
    short = EmbeddedLMSpec.model_validate(
        subject.model_dump() | {"config": subject.config.model_dump() | {"n_steps": STEPS}}
    )
    shape = (4 * short.config.batch_contexts, corpus.context_tokens)
    tokens = philox("probe", plan.config.seed).integers(0, short.config.vocab_size, shape, np.int32)
    contexts = Contexts(np.arange(shape[0], dtype=np.int32), tokens, np.zeros(shape, np.int32), None)
    model = new_model(short.config, short.config.vocab_size, corpus.context_tokens, plan.config.seed).to(device)
    times: list[float] = []

    def note(done: int, total: int, unit: str, note: str = "") -> None:
        times.append(time.perf_counter())
        progress(done, total, unit)

    nowhere = Storage(f"memory://probe-{uuid.uuid4().hex}")  # no checkpoint is looked for among others, or written
    train_model(model, short, contexts, Checkpoints(nowhere, short.ref, Position, new_attempt()), 0, note)
    return statistics.median(np.diff(times).tolist())


def probe_sae_step(
    config: TrainConfig, d_in: int, progress: Progress = silent, device: torch.device | str = "cpu"
) -> float:
    """Seconds of a training step of an SAE, on random vectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.batch_rows, d_in, generator=generator).to(device)
    blind = {"init": "default", "input_scale": "none"}  # others look at data
    config = TrainConfig.model_validate(config.model_dump() | blind)
    rows = RowsInMemory(x, config.batch_rows, seed=0)
    run = TrainingRun(config, DataMoments.of(x), n_steps=1000, device=device, rows=rows)
    run.advance(x)
    return _median_seconds(lambda: run.advance(x), progress, "steps", device)


def probe_storage(storage: Storage, n_bytes: int = STORAGE_BYTES, progress: Progress = silent) -> StorageSpeed:
    """Write, read and delete a file of `n_bytes` in the root. Raises: ConfigError when it cannot be written."""
    path = f"{layout.STAGING}/probe-{uuid.uuid4().hex}"
    data = np.random.default_rng(0).bytes(n_bytes)
    with _traceless(storage):
        storage.check_writable()
        try:
            with storage.staging() as folder:
                (folder / "data").write_bytes(data)
                started = time.perf_counter()
                storage.put_file(folder / "data", path)  # flushed to the disk
                written = time.perf_counter() - started
            progress(1, 3, "probes")
            if storage.is_local:
                _forget(Path(storage.full(path)))
            started = time.perf_counter()
            storage.read_bytes(path, 0, n_bytes)
            read = time.perf_counter() - started
            progress(2, 3, "probes")
            started = time.perf_counter()
            storage.read_bytes(path, 0, 1)
            request = time.perf_counter() - started
            progress(3, 3, "probes")
        finally:
            storage.remove(path)
    return StorageSpeed(n_bytes / written, n_bytes / read, request)


def context_correlation(act: torch.Tensor) -> float:
    """The correlation of two rows of a context, averaged over dimensions by their variance. act: [n, T, d_in]

    The intraclass correlation: mean product of pairs of one context about the mean of all, over the variance.
    """
    n, length, width = act.shape
    if n < 2 or length < 2:
        return 0.0
    centred = act.double() - act.double().reshape(-1, width).mean(0)
    squares = centred.square().sum((1, 2))
    pairs = (centred.sum(1).square().sum(1) - squares) / (length * (length - 1))
    variance = float(squares.sum()) / (n * length)
    return float(pairs.mean()) / variance if variance > 0 else 0.0


def _stored_text(plan: Plan, storage: Storage, shape: tuple[int, int]) -> torch.Tensor | None:
    """A batch of contexts [n, T] that are tokenized already."""
    for spec in plan.tokens:
        if is_intact(storage, spec.ref):
            contexts = read_contexts(storage, spec.ref, "train", 0, shape[0])
            if contexts.tokens.shape == shape and (contexts.docs != PADDING).all():
                return torch.from_numpy(contexts.tokens.astype(np.int64))
    return None


def _read_text(plan: Plan, tokenizer: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """A batch of contexts [n, T], each the beginning of a document; hubs are not asked for any."""
    corpus = plan.config.corpus
    assert corpus
    contexts: list[list[int]] = []
    for source in corpus.segments:
        if isinstance(source, DatasetSource):
            continue
        for document in itertools.islice(iter_documents(source), 50 * shape[0]):
            ids = tokenizer(document.text[: 20 * shape[1]], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= shape[1]:
                contexts.append(ids[: shape[1]])
            if len(contexts) == shape[0]:
                return torch.tensor(contexts)
    return None


def _median_seconds(
    work: Callable[[], object], progress: Progress, unit: str, device: torch.device | str = "cpu"
) -> float:
    """Of a call, over a few of them, until what it has told a device to do is done."""
    wait_for(device)
    started = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < BATCHES and time.perf_counter() - started < SECONDS):
        begun = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
        progress(len(seconds), BATCHES, unit)
    return statistics.median(seconds)


@contextlib.contextmanager
def _traceless(storage: Storage) -> Iterator[None]:
    """Delete the folders that the block makes on the way to a local root, and in it."""
    if not storage.is_local:
        yield
        return
    staging = Path(storage.full(layout.STAGING))
    missing = [folder for folder in (staging, *staging.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else has begun to use it
                os.rmdir(folder)


def _forget(path: Path) -> None:
    """Ask the kernel to read a file from its disk next time."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
