"""Large snapshots for the benchmarks: random rows of known size, written part by part."""

import numpy as np

from sae.extract.config import GivenPartsSpec, InlineSource
from sae.store.filesystem import Storage
from sae.store.records import commit
from sae.store.snapshot import Snapshot, SnapshotSpec, commit_snapshot, encode_vector, read_snapshot
from sae.store.writer import write_part


def write_random_snapshot(
    storage: Storage, *, n_parts: int, part_rows: int, d_in: int, row_group_rows: int
) -> Snapshot:
    """Parts of float16 rows from a normal distribution; all parts hold the same values."""
    act = np.random.default_rng(0).standard_normal((part_rows, d_in), np.float32).astype(np.float16)
    sums = act.sum(0, dtype=np.float64)
    sum_sq = float(sum(np.square(act[row], dtype=np.float64).sum() for row in range(part_rows)))
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
            layout = write_part(folder / "part.parquet", act, numbers, zeros, zeros, row_group_rows=row_group_rows)
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
