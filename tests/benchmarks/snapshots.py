"""Large snapshots for the benchmarks: a block of random rows, written again and again."""

import os

import numpy as np

from sae.extract.config import GivenPartsSpec, InlineSource
from sae.store.artefacts.records import commit
from sae.store.part.encoding import Encoding
from sae.store.part.writer import write_part
from sae.store.snapshots.snapshot import Snapshot, SnapshotSpec, commit_snapshot, encode_vector, read_snapshot
from sae.store.storage.filesystem import Storage


def random_rows(n_rows: int, d_in: int) -> np.ndarray:
    """Rows from a normal distribution. [n_rows, d_in] float16"""
    return np.random.default_rng(0).standard_normal((n_rows, d_in), np.float32).astype(np.float16)


def write_repeated(storage: Storage, act: np.ndarray, *, n_parts: int, row_group_rows: int) -> Snapshot:
    """A snapshot of parts that all hold the rows `act`. [part rows, d_in] float16"""
    part_rows, d_in = act.shape
    sums = act.sum(0, dtype=np.float64)
    sum_sq = float(sum(np.square(row, dtype=np.float64).sum() for row in act))
    spec = GivenPartsSpec(
        source=InlineSource(values=((0.0, 1.0), (1.0, 0.0))),
        content=f"{n_parts} x {part_rows} x {d_in}",
        split="train",
        heldout_fraction=0,
        dtype="float16",
        part_bytes=1,
        row_group_bytes=1,
        seed=row_group_rows,
    )
    for part in range(n_parts):
        numbers = np.arange(part * part_rows, (part + 1) * part_rows, dtype=np.int32)
        zeros = np.zeros(part_rows, np.int32)
        with storage.staging() as folder:
            layout = write_part(
                folder / "part.parquet",
                act,
                numbers,
                zeros,
                zeros,
                row_group_rows=row_group_rows,
                encoding=Encoding(dtype="float16"),
            )
            metrics = {
                "layout": layout.model_dump(mode="json"),
                "n_rows": part_rows,
                "sum": encode_vector(sums),
                "sum_sq": sum_sq,
            }
            commit(storage, spec, folder, metrics, seconds=0.0, part=part)
    with storage.staging() as folder:
        plan = {"n_parts": n_parts, "tokens_per_part": part_rows, "d_in": d_in}
        commit(storage, spec, folder, plan, seconds=0.0)
    snapshot = SnapshotSpec(parts=(spec.ref,), n_tokens=None)
    commit_snapshot(storage, snapshot)
    return read_snapshot(storage, snapshot.ref)


def evict(storage: Storage, snapshot: Snapshot) -> None:
    """Drop the parts' files from the page cache."""
    for part in snapshot.parts:
        with open(storage.full(part.path), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
