"""Part files against raw reads and writes of the same bytes, and beside pyarrow's own writer and reader."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq

from sae.store.part import writer
from sae.store.part.encoding import Encoding
from sae.store.part.writer import write_part
from sae.store.reading.reader import RowGroupReader
from sae.store.storage.filesystem import Storage
from sae.store.storage.local import fsync
from tests.benchmarks.timing import Row, compare
from tests.conftest import write_snapshot
from tests.sae.store.part.oracle import write_with_pyarrow

D_IN, N_ROWS, ROW_GROUP_ROWS = 1024, 131_072, 16_384
"""256 MiB of float16 in row groups of 32 MiB: at most 512 MiB of disk at a time."""
N_PAIRS = 7
ENCODING = Encoding(dtype="float16")
NOT_COMPUTED = "0" * 16


def store_io(folder: Path) -> Iterator[Row]:
    """MB/s of vectors, in the page cache unless it says otherwise: a disk's own speed varies more than all of this."""
    rng = np.random.default_rng(0)
    act = np.concatenate([rng.standard_normal((4096, D_IN), np.float32).astype(np.float16)] * (N_ROWS // 4096))
    ids = [np.arange(N_ROWS, dtype=np.int32) for _ in range(3)]
    yield from _writing(folder, act, ids)
    yield from _reading(folder, act)


def _writing(folder: Path, act: np.ndarray, ids: list[np.ndarray]) -> Iterator[Row]:
    path = folder / "part.parquet"
    data = act.reshape(-1).view(np.uint8).data
    step = ROW_GROUP_ROWS * D_IN * act.itemsize

    def write_raw() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for start in range(0, len(data), step):
            assert os.pwrite(descriptor, data[start : start + step], start) == step
        os.close(descriptor)

    def write(how: Callable[..., object] = write_part, **options: bool) -> None:
        how(path, act, *ids, row_group_rows=ROW_GROUP_ROWS, encoding=ENCODING, **options)

    def write_without_checksums() -> None:
        with (
            mock.patch.object(writer, "crc32", return_value=0),
            mock.patch("xxhash.xxh3_64", return_value=mock.Mock(hexdigest=lambda: NOT_COMPUTED)),
        ):
            write()

    def finished(make: Callable[[], object], durable: bool) -> Callable[[], None]:
        def call() -> None:
            make()
            if durable:
                fsync(path)
            path.unlink()

        return call

    def against_raw(what: str, ours: Callable[[], object], durable: bool, n_pairs: int = N_PAIRS) -> Row:
        raw, megabytes = finished(write_raw, durable), act.nbytes / 1e6
        return compare(f"{what} / raw write", finished(ours, durable), raw, megabytes, "MB", n_pairs=n_pairs)

    yield against_raw("write of a part to the page cache", write, False)
    yield against_raw("  without CRC and xxh3", write_without_checksums, False)
    yield against_raw("  by pyarrow", lambda: write(write_with_pyarrow), False, n_pairs=3)
    yield against_raw("write of a part to the disk, with fsync", lambda: write(durable=True), True)


def _reading(folder: Path, act: np.ndarray) -> Iterator[Row]:
    storage = Storage(str(folder / "root"))
    snapshot = write_snapshot(storage, [act], row_group_rows=ROW_GROUP_ROWS)
    (part,) = snapshot.parts
    path = storage.full(part.path)
    out = np.empty((ROW_GROUP_ROWS, D_IN), np.float16)
    buffer = out.reshape(-1).view(np.uint8).data

    def raw() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        for place in part.layout.row_groups:
            assert os.preadv(descriptor, [buffer], place.offset) == len(buffer)
        os.close(descriptor)

    def direct() -> None:
        reader = RowGroupReader(storage, snapshot)
        for group in range(len(part.layout.row_groups)):
            reader.read_into(0, group, out)
        reader.close()

    def unchecked() -> None:
        recorded = itertools.cycle([place.xxh3 for place in part.layout.row_groups])
        found = mock.Mock(update=lambda _: None, hexdigest=lambda: next(recorded))
        with mock.patch("xxhash.xxh3_64", return_value=found):
            direct()

    def from_disk(read: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            read()

        return call

    def by_pyarrow() -> None:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                column = file.read_row_group(group, columns=["act"])["act"].combine_chunks()
                np.copyto(out.reshape(-1), column.flatten().to_numpy(zero_copy_only=False))

    megabytes = act.nbytes / 1e6
    what = "direct read into a reused buffer, xxh3 checked / raw read"
    yield compare(what, direct, raw, megabytes, "MB", n_pairs=N_PAIRS)
    what = "  not from the page cache but from the disk / raw read"
    yield compare(what, from_disk(direct), from_disk(raw), megabytes, "MB", n_pairs=N_PAIRS)
    yield compare("  without the check / raw read", unchecked, raw, megabytes, "MB", n_pairs=N_PAIRS)
    yield compare("  read by pyarrow into the same buffer / raw read", by_pyarrow, raw, megabytes, "MB", n_pairs=3)
