"""A part set of a million parts: listed, looked through for what is missing, frozen as a snapshot, loaded.

No vector is stored. The listing is made up, name by name, as a bucket would page it; the 10,000 indexes of groups of
parts are real files (some 1.5 GB), and so is the snapshot. Every step runs in a process of its own, whose peak memory
is shown. The environment variable SCALE_PARTS makes it smaller.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sae.extract.config import PartsSpec
from sae.store import layout
from sae.store.artefacts.records import commit
from sae.store.part.encoding import Encoding
from sae.store.part.writer import PartLayout, RowGroup
from sae.store.reading.order import Epoch
from sae.store.reading.shuffle import RowGroups, ShuffleConfig
from sae.store.snapshots.moments import encode_vector
from sae.store.snapshots.part_sets import PartGroup, finished_parts, groups_of, index_file, write_index
from sae.store.snapshots.part_table import PART_FILE, PartTable
from sae.store.snapshots.snapshot import SnapshotSpec, commit_snapshot, read_snapshot
from sae.store.storage.filesystem import Storage, StoredFile
from tests.benchmarks.timing import Cost, resident_bytes

N_PARTS = int(os.environ.get("SCALE_PARTS", 1_000_000))
ROW_GROUPS, GROUP_ROWS, D_IN = 32, 4096, 4096
"""Parts of 1 GiB: 10^6 of them are a pebibyte."""
GROUP_BYTES = GROUP_ROWS * D_IN * 2
SPEC = PartsSpec(
    tokens=f"tokens/{'0' * 16}",
    subject=f"subjects/{'0' * 16}",
    split="train",
    hook_point="a hook point",
    dtype="float16",
    part_bytes=ROW_GROUPS * GROUP_BYTES,
    row_group_bytes=GROUP_BYTES,
    batch_contexts=1,
    keep_special=False,
    seed=0,
)
SNAPSHOT = SnapshotSpec(parts=(SPEC.ref,), n_tokens=None)


def scale(folder: Path) -> Iterator[Cost]:
    """Seconds, bytes and peak memory of every step."""
    root = str(folder / "root")
    n_files, n_bytes = _make_indexes(root)
    yield _alone("nothing: importing the libraries", _nothing, root, 0)
    groups = f"{N_PARTS:,} parts x {ROW_GROUPS} row groups"
    yield _alone(f"{groups}: list {2 * N_PARTS + n_files:,} names", _list, root, 0)
    yield _alone(f"  and read {n_files:,} indexes: nothing is missing", _look, root, n_bytes)
    yield _alone("  and again when one part in a hundred is gone", _look_for_missing, root, n_bytes)
    yield _alone("commit the snapshot (listing and indexes read again)", _commit, root, n_bytes)
    storage = Storage(root)
    snapshot_bytes = sum(storage.sizes(SNAPSHOT.ref).values())
    yield _alone("load the snapshot", _load, root, snapshot_bytes)
    yield _alone("  and lay out one shuffled epoch", _epoch, root, snapshot_bytes)
    yield _alone("write the index of one group from 100 records", _index_group, root, 0)


class MadeUpListing(Storage):
    """A root whose part set seems to hold all files of a million parts; `missing` of every hundred are gone."""

    missing = 0

    def walk(self, folder: str) -> Iterator[StoredFile]:
        if folder != SPEC.ref:
            yield from super().walk(folder)
            return
        yield from super().walk(layout.index_folder(SPEC.ref))
        contents = _contents().tolist()
        for part, content in enumerate(contents):
            yield StoredFile(layout.record_path(SPEC.ref, part), 9000, 0.0)
            if part % 100 >= self.missing:
                path = f"{layout.content_folder(SPEC.ref, f'{content:016x}', part)}/{PART_FILE}"
                yield StoredFile(path, _part_bytes(), 0.0)


def _list(root: str) -> None:
    for _ in MadeUpListing(root).walk(SPEC.ref):
        pass


def _look(root: str) -> None:
    assert finished_parts(MadeUpListing(root), SPEC.ref, N_PARTS).all()


def _look_for_missing(root: str) -> None:
    """The parts whose files are gone have records, as far as the listing says; these are not there to be read."""
    storage = MadeUpListing(root)
    storage.missing = 1
    finished = finished_parts(storage, SPEC.ref, N_PARTS)
    assert np.array_equal(np.flatnonzero(~finished), np.arange(0, N_PARTS, 100))


def _commit(root: str) -> None:
    commit_snapshot(MadeUpListing(root), SNAPSHOT)


def _load(root: str) -> None:
    snapshot = read_snapshot(Storage(root), SNAPSHOT.ref)
    assert len(snapshot.parts) == N_PARTS
    assert len(snapshot.parts[N_PARTS // 2].layout.row_groups) == ROW_GROUPS


def _epoch(root: str) -> None:
    snapshot = read_snapshot(Storage(root), SNAPSHOT.ref)
    groups = RowGroups(snapshot.group_rows_flat, snapshot.group_starts)
    Epoch(groups, 8192, 0, 0, ShuffleConfig().sizes(groups, 2 * D_IN))


def _index_group(root: str) -> None:
    """With real records, of parts without vectors."""
    storage = Storage(f"{root}-records")
    parts = range(max(2, len(groups_of(N_PARTS)[0])))
    rng = np.random.default_rng(0)
    row_group = RowGroup(offset=4096, n_rows=GROUP_ROWS, xxh3="0" * 16, identity=(1, 2, 3), identity_xxh3="0" * 16)
    about = PartLayout(
        n_rows=ROW_GROUPS * GROUP_ROWS,
        d_in=D_IN,
        encoding=Encoding(dtype="float16"),
        row_groups=(row_group,) * ROW_GROUPS,
    )
    for part in parts:
        metrics = {"layout": about.model_dump(mode="json")} | _sums(rng, about.n_rows)
        with storage.staging() as folder:
            (folder / PART_FILE).write_bytes(b"")
            commit(storage, SPEC, folder, metrics, seconds=0.0, part=part)
    started = time.perf_counter()
    write_index(storage, SPEC.ref, N_PARTS, parts)
    _STARTED.append(started)


def _nothing(root: str) -> None:
    """What every other step's process holds too."""


_STARTED: list[float] = []
"""When a step began that had to prepare something in its own process."""


def _alone(what: str, step: Callable[[str], None], root: str, n_bytes: int) -> Cost:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        seconds, peak = process.submit(_measure, step, root).result()
    return Cost(what, seconds, n_bytes, peak)


def _measure(step: Callable[[str], None], root: str) -> tuple[float, int]:
    started = time.perf_counter()
    step(root)
    seconds = time.perf_counter() - (_STARTED[-1] if _STARTED else started)
    return seconds, resident_bytes("VmHWM")


def _contents() -> np.ndarray:
    """Digests of the parts. [parts] uint64"""
    return np.random.default_rng(0).integers(1 << 63, size=N_PARTS, dtype=np.uint64)


def _sums(rng: np.random.Generator, n_rows: int) -> dict[str, Any]:
    """The counts and sums of a record, under the names that extraction gives them."""
    vectors = {name: encode_vector(rng.random(D_IN)) for name in ("sum", "sum_sq_by_dim")}
    return vectors | {"n_rows": n_rows, "n_special": 0, "n_padding": 0, "sum_sq": 1.0, "sum_norm": 1.0}


def _part_bytes() -> int:
    return ROW_GROUPS * (GROUP_BYTES + 3 * 4 * GROUP_ROWS + 8192)


def _make_indexes(root: str) -> tuple[int, int]:
    """The part set's record and the indexes of all its groups. Returns: how many indexes, and their bytes."""
    storage = Storage(root)
    with storage.staging() as folder:
        plan = {"n_parts": N_PARTS, "tokens_per_part": ROW_GROUPS * GROUP_ROWS, "d_in": D_IN}
        commit(storage, SPEC, folder, plan, seconds=0.0)
    contents, rng = _contents(), np.random.default_rng(1)
    Path(storage.full(layout.index_folder(SPEC.ref))).mkdir(parents=True)
    n_files = n_bytes = 0
    sums = _sums(rng, 0)
    for parts in groups_of(N_PARTS):
        # Every part's last row group is short by other rows: special tokens and padding are left out.
        rows = np.full((len(parts), ROW_GROUPS), GROUP_ROWS, np.int32)
        rows[:, -1] -= rng.integers(GROUP_ROWS, size=len(parts), dtype=np.int32)
        begin = np.arange(ROW_GROUPS, dtype=np.int64) * (GROUP_BYTES + 3 * 4 * GROUP_ROWS + 8192) + 4096
        act = np.broadcast_to(begin, rows.shape)
        seq = act + rows * (2 * D_IN) + 64
        table = PartTable(
            d_in=D_IN,
            dtype="float16",
            refs=(SPEC.ref,),
            part_set=np.zeros(len(parts), np.int32),
            part=np.array(parts, np.int32),
            n_rows=rows.sum(axis=1, dtype=np.int64),
            n_bytes=np.full(len(parts), _part_bytes()),
            content=contents[parts.start : parts.stop],
            exponent=np.zeros(len(parts), np.int32),
            starts=np.arange(len(parts) + 1, dtype=np.int64) * ROW_GROUPS,
            group_rows=rows.reshape(-1),
            offsets=np.stack([act, seq, seq + rows * 4 + 64, seq + rows * 8 + 128]).reshape(4, -1).astype(np.uint32),
            hashes=rng.integers(1 << 63, size=(2, rows.size), dtype=np.uint64),
        )
        path, data = index_file(PartGroup(table, sums | {"n_rows": int(rows.sum())}))
        Path(storage.full(path)).write_bytes(data)
        n_files, n_bytes = n_files + 1, n_bytes + len(data)
    return n_files, n_bytes
