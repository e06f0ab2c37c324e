"""Shuffled batches against a raw sequential read of the same bytes, and the memory they take.

python -m tests.benchmarks.loading 1 4 16    peak memory for stores of so many GiB, written to a temporary folder

Ours is an epoch of a loader that is open: checks of hashes, the shuffle, read-ahead, conversion to float32. Raw reads
take a row group at a time from the page cache. Into one buffer they never leave the processor's caches: that is a speed
of the caches. A shuffle needs the rows of many row groups at once, so the second raw read goes to as much memory as a
window has, again and again, and the third converts what it has read. None of them checks anything.

A row of its own says what a loader of such batches can reach on one core: the least that it must do (read, hash,
scatter, convert) by one bare call each a piece, in one thread that decides nothing.
"""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from sae.store.reading.loader import Loader
from sae.store.reading.reader import PIECE_BYTES
from sae.store.reading.shuffle import RUN_BYTES, RowGroups, ShuffleConfig
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from tests.benchmarks.snapshots import evict, random_rows, write_repeated
from tests.benchmarks.timing import Row, compare, resident_bytes

STORES = {512: (64 << 20, 4 << 20), 4096: (256 << 20, 32 << 20)}
"""Bytes of a part and of a row group, by d_in."""
STORE_BYTES, BATCH_ROWS, MEMORY_GIB = 1 << 30, 4096, (1, 4)
WINDOW_BYTES = 256 << 20
"""Of one stream, by default."""
WARM_EPOCHS = 6
"""After which all memory has been in use: the kernel clears new pages far more slowly than they are filled."""


def loading(folder: Path) -> Iterator[Row]:
    """Rows/s on one core and on two, for narrow and wide rows; peak memory beside the bound that the loader states."""
    for d_in in STORES:
        storage = Storage(str(folder / str(d_in)))
        snapshot = _write(storage, d_in, STORE_BYTES)
        for n_cores in (1, 2):
            with _cores(n_cores):
                yield from _speeds(storage, snapshot, f"d_in {d_in}, {n_cores} core(s)", from_disk=False)
        with _cores(1):
            yield _least(storage, snapshot, f"d_in {d_in}, 1 core(s)")
            yield from _speeds(storage, snapshot, f"d_in {d_in}, 1 core(s)", from_disk=True)
    yield from memory(MEMORY_GIB)


def memory(sizes: Sequence[int]) -> Iterator[Row]:
    """Peak memory of an epoch, without the libraries' own, for stores of so many GiB."""
    for d_in in STORES:
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                snapshot = _write(Storage(folder), d_in, size << 30)
                command = [sys.executable, "-m", "tests.benchmarks.loading", folder, snapshot.ref]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, bound = int(done.stdout), _bound(snapshot)
                what = f"d_in {d_in}, {size} GiB: peak memory / what the loader states"
                yield Row(what, f"{peak >> 20:,} MiB", f"{bound >> 20:,} MiB", (peak / bound,))


def _speeds(storage: Storage, snapshot: Snapshot, where: str, *, from_disk: bool) -> Iterator[Row]:
    loader = Loader(storage, snapshot, BATCH_ROWS, seed=0)
    ring = _window(snapshot)
    decoded = torch.zeros(ring.shape[1:])

    def raw(n_buffers: int, *, convert: bool = False) -> None:
        _read_raw(storage, snapshot, ring[:n_buffers], decoded if convert else None)

    def shuffled() -> None:
        for _ in range(loader.batches_per_epoch):
            next(loader)

    def evicted(call: Callable[[], None]) -> Callable[[], None]:
        def evict_and_call() -> None:
            evict(storage, snapshot)
            call()

        return evict_and_call

    rows = float(snapshot.n_rows)
    if from_disk:
        what = f"{where}: shuffled / raw read, from the disk"
        yield compare(what, evicted(shuffled), evicted(functools.partial(raw, 1)), rows, "rows", n_pairs=3)
    else:
        for _ in range(WARM_EPOCHS):
            shuffled()
        for what, call in {
            "raw read into one buffer": functools.partial(raw, 1),
            "raw read into a window's memory": functools.partial(raw, len(ring)),
            "the same and to float32": functools.partial(raw, len(ring), convert=True),
        }.items():
            yield compare(f"{where}: shuffled / {what}", shuffled, call, rows, "rows")
    loader.close()


def _window(snapshot: Snapshot) -> np.ndarray:
    """As much memory as a window has, in row groups. [row groups, rows, d_in] float16"""
    group_rows = int(snapshot.group_rows_flat.max())
    return np.zeros((max(1, WINDOW_BYTES // (2 * snapshot.d_in * group_rows)), group_rows, snapshot.d_in), np.float16)


def _read_raw(storage: Storage, snapshot: Snapshot, ring: np.ndarray, decoded: Tensor | None = None) -> None:
    """Every row group into the next of a ring of buffers, and as float32 to `decoded`."""
    buffers = itertools.cycle(ring)
    for part in snapshot.parts:
        descriptor = os.open(storage.full(part.path), os.O_RDONLY)
        for place in part.layout.row_groups:
            buffer = next(buffers)[: place.n_rows]
            os.preadv(descriptor, [buffer.reshape(-1).view(np.uint8).data], place.offset)
            if decoded is not None:
                decoded[: place.n_rows].copy_(torch.from_numpy(buffer))
        os.close(descriptor)


def _least(storage: Storage, snapshot: Snapshot, where: str) -> Row:
    """Pieces are read and hashed in a cache, their runs go to random places of a window, and batches come from it."""
    ring = _window(snapshot)
    runs = ring.reshape(-1).view(np.dtype((np.void, RUN_BYTES)))
    order = np.random.default_rng(0).permutation(len(runs)).reshape(-1, PIECE_BYTES // RUN_BYTES)
    piece = np.zeros(PIECE_BYTES // RUN_BYTES, runs.dtype)
    data = piece.view(np.uint8).data
    batches = torch.from_numpy(ring).view(-1, BATCH_ROWS, snapshot.d_in)
    batch, batch_bytes = torch.zeros(batches[0].shape), batches[0].nbytes

    def least() -> None:
        places, drawn, n_bytes = itertools.cycle(order), itertools.cycle(batches), 0
        for part in snapshot.parts:
            descriptor = os.open(storage.full(part.path), os.O_RDONLY)
            for group in part.layout.row_groups:
                found = xxhash.xxh3_64()
                for start in range(0, 2 * snapshot.d_in * group.n_rows, PIECE_BYTES):
                    os.preadv(descriptor, [data], group.offset + start)
                    found.update(data)
                    runs[next(places)] = piece
                    n_bytes += PIECE_BYTES
                    if n_bytes % batch_bytes == 0:
                        batch.copy_(next(drawn))
                assert found.hexdigest() == group.xxh3
            os.close(descriptor)

    raw = functools.partial(_read_raw, storage, snapshot, ring[:1])
    return compare(f"{where}: the least / raw read into one buffer", least, raw, float(snapshot.n_rows), "rows")


def _write(storage: Storage, d_in: int, n_bytes: int) -> Snapshot:
    part_bytes, group_bytes = STORES[d_in]
    act = random_rows(part_bytes // (2 * d_in), d_in)
    return write_repeated(storage, act, n_parts=n_bytes // part_bytes, row_group_rows=group_bytes // (2 * d_in))


def _groups(snapshot: Snapshot) -> RowGroups:
    return RowGroups(snapshot.group_rows_flat, snapshot.group_starts)


def _bound(snapshot: Snapshot) -> int:
    """What the docstring of Loader says, for one rank."""
    row_bytes = 2 * snapshot.d_in
    sizes = ShuffleConfig().sizes(_groups(snapshot), row_bytes)
    group = int(snapshot.group_rows_flat.max()) * row_bytes
    n_groups = (1 + 2 / sizes.n_streams) * sizes.window_row_groups
    return int(n_groups * group) + 2 * PIECE_BYTES + 2 * BATCH_ROWS * 4 * snapshot.d_in


@contextlib.contextmanager
def _cores(n: int) -> Iterator[None]:
    """Run on so many cores: threads that are started meanwhile, too."""
    before, n_threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(before)[:n])
    torch.set_num_threads(min(n, len(before)))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(n_threads)


def _peak_bytes(root: str, ref: str) -> int:
    """Of one epoch in this process, above what it had before."""
    storage = Storage(root)
    snapshot = read_snapshot(storage, ref)
    before = resident_bytes("VmRSS")
    loader = Loader(storage, snapshot, BATCH_ROWS, seed=0)
    for _ in range(loader.batches_per_epoch):
        next(loader)
    loader.close()
    return resident_bytes("VmHWM") - before


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].isdigit():
        print(_peak_bytes(*sys.argv[1:]))
    else:
        for row in memory([int(size) for size in sys.argv[1:]]):
            print(row, flush=True)
