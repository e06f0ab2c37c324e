"""The remix: what it costs beside two plain copies of the same files, and what it does for those who read in order."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sae.extract.config import ArraySource, DealtPartsSpec, GivenPartsSpec, RemixSpec
from sae.extract.given import import_activations, resolve_given_content
from sae.extract.remix import count_parts, deal_part, finish_dealing, finish_remix, gather_part, remove_dealt
from sae.store.reading.blocks import iter_rows
from sae.store.reading.loader import Loader
from sae.store.reading.shuffle import ShuffleConfig
from sae.store.snapshots.snapshot import Snapshot, SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from tests.benchmarks.timing import Row, compare

D_IN, CONTEXT_TOKENS, N_PARTS, BATCH_ROWS = 512, 128, 16, 2048
PART_ROWS, ROW_GROUP_ROWS, ROW_BYTES = 16_384, 1024, 2 * D_IN
IN_MEMORY = 64
DRIFT, OF_CONTEXT = 0.15, 0.5
"""Steps of a walk that contexts' means follow, and how far each lies from it, in units of a row's own noise."""


def remix(folder: Path) -> Iterator[Row]:
    """Rows/s of dealing and gathering; variance of batch means over that of independent rows."""
    storage = Storage(str(folder / "root"))
    source = _import(storage, corpus_in_order(), folder / "act.npy")
    seeds = itertools.count()

    def remixed() -> None:
        remove_dealt(storage, _remix(storage, source, next(seeds)))

    def copied() -> None:
        for part in source.parts:
            for source_path, target in ((storage.full(part.path), "first"), (str(folder / "first"), "second")):
                _copy(source_path, folder / target)

    what = "remix / two plain copies of the same files (float16)"
    yield compare(what, remixed, copied, float(source.n_rows), "rows", n_pairs=3)
    spec = _remix(storage, source, next(seeds))
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot)
    mixed = read_snapshot(storage, snapshot.ref)
    for how, read in (("read in order", _in_order), (f"loader, {IN_MEMORY} row groups in memory", _shuffled)):
        before, after = (variance_over_iid(read(storage, each), source) for each in (source, mixed))
        line = f"variance over iid, {how}"
        yield Row(line, f"remixed {after:.2f}", f"not {before:.2f}", (before / after,))


def corpus_in_order() -> np.ndarray:
    """Rows of contexts, each of which resembles the one before. [rows, d_in] float16"""
    rng = np.random.default_rng(0)
    n_contexts = N_PARTS * PART_ROWS // CONTEXT_TOKENS
    topic = np.cumsum(DRIFT * rng.standard_normal((n_contexts, D_IN), np.float32), axis=0)
    topic += OF_CONTEXT * rng.standard_normal((n_contexts, D_IN), np.float32)
    rows = np.empty((n_contexts * CONTEXT_TOKENS, D_IN), np.float16)
    for context, start in zip(topic, range(0, len(rows), CONTEXT_TOKENS), strict=True):
        rows[start : start + CONTEXT_TOKENS] = context + rng.standard_normal((CONTEXT_TOKENS, D_IN), np.float32)
    return rows


def variance_over_iid(batches: Iterable[np.ndarray], snapshot: Snapshot) -> float:
    """Variance of the means of batches of BATCH_ROWS rows, over that of as many independent rows."""
    means = np.stack([batch.mean(0, dtype=np.float64) for batch in batches if len(batch) == BATCH_ROWS])
    return float(np.square(means - snapshot.mean).sum(1).mean() / (snapshot.mean_sq_norm / BATCH_ROWS))


def _import(storage: Storage, rows: np.ndarray, path: Path) -> Snapshot:
    """The rows as parts, mixed within each, as given activations are."""
    np.save(path, rows)
    source = ArraySource(url=str(path))
    spec = GivenPartsSpec(
        source=source,
        content=resolve_given_content(source),
        split="train",
        heldout_fraction=0,
        dtype="float16",
        part_bytes=PART_ROWS * ROW_BYTES,
        row_group_bytes=ROW_GROUP_ROWS * ROW_BYTES,
        seed=0,
    )
    import_activations(storage, spec)
    path.unlink()
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot)
    return read_snapshot(storage, snapshot.ref)


def _remix(storage: Storage, source: Snapshot, seed: int) -> RemixSpec:
    part_bytes, row_group_bytes = PART_ROWS * ROW_BYTES, ROW_GROUP_ROWS * ROW_BYTES
    spec = RemixSpec(source=source.ref, part_bytes=part_bytes, row_group_bytes=row_group_bytes, seed=seed)
    dealt = DealtPartsSpec(remix=spec)
    n_source, n_parts = count_parts(storage, spec)
    for part in range(n_source):
        deal_part(storage, dealt, part)
    finish_dealing(storage, dealt)
    for part in range(n_parts):
        gather_part(storage, spec, part)
    finish_remix(storage, spec)
    return spec


def _in_order(storage: Storage, snapshot: Snapshot) -> Iterator[np.ndarray]:
    rows = np.concatenate([block.act.copy() for block in iter_rows(storage, snapshot)])
    yield from np.split(rows, range(BATCH_ROWS, len(rows), BATCH_ROWS))


def _shuffled(storage: Storage, snapshot: Snapshot) -> Iterator[np.ndarray]:
    # With the memory that it takes by default, the loader would hold all of so small a store.
    loader = Loader(storage, snapshot, BATCH_ROWS, seed=0, shuffle=ShuffleConfig(window_row_groups=IN_MEMORY))
    try:
        for _ in range(loader.batches_per_epoch):
            yield next(loader).numpy()
    finally:
        loader.close()


def _copy(source: str, target: Path) -> None:
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while block := reading.read(4 << 20):
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
