"""Ranges of files: what is read is what was written, from disk, memory and S3."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from sae.errors import StoreError
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import MAX_OPEN_FILES, LocalRanges, Range, open_ranges
from tests.sae.store.storage.ranged import fill, read


def test_ranges_of_several_files_fill_their_buffers(any_storage: Storage) -> None:
    files = fill(any_storage)
    wanted = [(path, start, start + size) for size in (1, 4096, 70_000) for path in files for start in (0, 17, 30_000)]
    random.Random(0).shuffle(wanted)
    assert read(any_storage, *wanted) == [files[path][start:stop] for path, start, stop in wanted]


def test_a_range_that_the_file_ends_before_is_said_to_be(any_storage: Storage) -> None:
    (path, data), *_ = fill(any_storage, 1).items()
    size = len(data)
    wanted = [
        (path, size - 5, size + 1),
        (path, size - 5, size),
        (path, size, size + 1),
        (path, 2 * size, 2 * size + 9),
    ]
    assert read(any_storage, *wanted) == [None, data[-5:], None, None]
    assert read(any_storage) == []
    assert read(any_storage, (path, 7, 7)) == [b""]


def test_a_missing_file_is_a_store_error_that_names_it(any_storage: Storage) -> None:
    (path, _), *_ = fill(any_storage, 1).items()
    with pytest.raises(StoreError, match="folder/none: no such file"):
        read(any_storage, (path, 0, 10), ("folder/none", 0, 10))


def test_many_threads_read_with_one_reader(any_storage: Storage) -> None:
    files = fill(any_storage, 5, 20_000)
    reader = open_ranges(any_storage)

    def one(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(5):
            wanted = [(path, draw.randrange(10_000), bytearray(5_000)) for path in files]
            assert all(reader.read([Range(path, start, memoryview(buffer)) for path, start, buffer in wanted]))
            assert all(buffer == files[path][start : start + 5_000] for path, start, buffer in wanted)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))
    reader.close()


def test_no_more_files_stay_open_than_may(storage: Storage) -> None:
    files = fill(storage, MAX_OPEN_FILES + 20, 10)
    reader = LocalRanges(storage)
    before = len(os.listdir("/proc/self/fd"))
    for path, data in files.items():
        buffer = bytearray(10)
        assert reader.read([Range(path, 0, memoryview(buffer))]) == [True]
        assert buffer == data
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_FILES
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_what_is_not_in_the_page_cache_is_announced(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, _), *_ = fill(storage, 1, 10_000).items()
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, n_bytes, advice: announced.append((offset, n_bytes)))
    reader = LocalRanges(storage)
    reader.announce(path, 100, 5000)
    warm = list(announced)
    reader.announce(path, 9000, 5000)  # beyond the end: cannot be in the cache
    reader.close()
    assert warm in ([], [(100, 5000)])  # a file system need not say that it is there
    assert announced[len(warm) :] == [(9000, 5000)]
