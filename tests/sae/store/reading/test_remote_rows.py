"""Row groups of parts on S3: the recorded hash decides, whatever the network does."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sae.errors import DamagedError
from sae.store.reading.blocks import READ_AHEAD, iter_rows
from sae.store.reading.loader import Loader
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot
from tests.sae.store.network import READING, Network, Request, lottery


@pytest.fixture
def parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n_rows, 8)).astype(np.float16) for n_rows in (500, 120, 1)]


@pytest.fixture
def snapshot(s3_root: str, hop: Network, make_snapshot: MakeSnapshot, parts: list[np.ndarray]) -> Snapshot:
    """On S3, written before anything went wrong."""
    return make_snapshot(Storage(s3_root), parts, row_group_rows=20)


def is_vectors(snapshot: Snapshot, part: int, group: int) -> Callable[[Request], bool]:
    """Whether a request is for the vectors of a row group."""
    entry = snapshot.parts[part]
    offset = entry.layout.row_groups[group].offset
    return lambda request: request.path.endswith(entry.path) and request.range.startswith(f"{offset}-")


def test_rows_come_back_through_every_fault(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    hop.fault = lottery(3, 0.1, READING)
    blocks = [(block.act.copy(), block.seq) for block in iter_rows(Storage(s3_root), snapshot)]
    assert np.array_equal(np.concatenate([act for act, _ in blocks]), np.concatenate(parts))
    assert np.array_equal(np.concatenate([seq for _, seq in blocks]), np.arange(621))
    assert sum(hop.faults[kind] > 0 for kind in READING) >= 4


def test_shuffled_batches_are_the_same_through_every_fault(
    s3_root: str,
    hop: Network,
    snapshot: Snapshot,
    storage: Storage,
    make_snapshot: MakeSnapshot,
    parts: list[np.ndarray],
) -> None:
    on_disk = make_snapshot(storage, parts, row_group_rows=20)
    hop.fault = lottery(5, 0.1, READING)
    loaders = [Loader(Storage(s3_root), snapshot, 48, seed=1), Loader(storage, on_disk, 48, seed=1)]
    for _ in range(2 * loaders[0].batches_per_epoch):
        assert torch.equal(next(loaders[0]), next(loaders[1]))
    for loader in loaders:
        loader.close()
    assert sum(hop.faults[kind] > 0 for kind in READING) >= 4


def test_many_row_groups_are_read_at_once_and_by_many_threads(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    hop.fault = lottery(3, 0.1, READING)
    reader = RowGroupReader(Storage(s3_root), snapshot)

    def one(seed: int) -> None:
        groups = np.random.default_rng(seed).permutation(25)
        out = np.empty((25, 20, 8), np.float16)
        reader.read_many([(0, int(group), out[group]) for group in groups])
        assert np.array_equal(out.reshape(parts[0].shape), parts[0])
        found = reader.read_identities([(0, int(group)) for group in groups])
        assert all(ids[0].tolist() == list(range(20 * g, 20 * g + 20)) for ids, g in zip(found, groups, strict=True))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(4)))
    reader.close()


def test_a_byte_that_the_network_flipped_is_read_again(
    s3_root: str, hop: Network, snapshot: Snapshot, parts: list[np.ndarray]
) -> None:
    is_here = is_vectors(snapshot, 0, 3)
    hop.fault = lambda request: "flip" if is_here(request) and request.again == 0 else ""
    reader = RowGroupReader(Storage(s3_root), snapshot)
    hop.seen.clear()
    reader.read_into(0, 3, out := np.empty((20, 8), np.float16))
    reader.close()
    assert np.array_equal(out, parts[0][60:80])
    assert len(hop.seen) == 2


def test_a_byte_that_is_wrong_in_the_bucket_is_damage(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    entry = snapshot.parts[1]
    offset = entry.layout.row_groups[2].offset
    data = bytearray(storage.read_bytes(entry.path))
    data[offset + 5] ^= 1
    storage.replace(entry.path, bytes(data))
    reader = RowGroupReader(storage, snapshot)
    outs = [np.empty((20, 8), np.float16) for _ in range(3)]
    with pytest.raises(DamagedError, match=rf"part\.parquet: row group 2: .*at offset {offset}\).*part 1 of") as caught:
        reader.read_many([(1, group, out) for group, out in enumerate(outs)])
    reader.close()
    assert (caught.value.ref, caught.value.part) == (entry.ref, 1)


def test_an_object_that_was_deleted_is_named(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    storage.remove(snapshot.parts[1].path)
    with pytest.raises(DamagedError, match="missing, though the snapshot") as caught:
        list(iter_rows(storage, snapshot))
    assert (caught.value.ref, caught.value.part) == (snapshot.parts[1].ref, 1)


def test_an_object_that_is_too_short_is_damage(s3_root: str, hop: Network, snapshot: Snapshot) -> None:
    storage = Storage(s3_root)
    storage.replace(snapshot.parts[0].path, storage.read_bytes(snapshot.parts[0].path)[:1000])
    with pytest.raises(DamagedError, match="is damaged"):
        list(iter_rows(storage, snapshot))


def test_the_next_row_groups_are_read_while_one_is_used_and_no_more(
    s3_root: str, hop: Network, snapshot: Snapshot
) -> None:
    storage = Storage(s3_root)
    hop.seen.clear()
    before = threading.active_count()
    blocks = iter_rows(storage, snapshot)
    for n_used in (1, 2, 3):
        next(blocks)
        n_read = 2 * (n_used + READ_AHEAD)  # vectors and identity
        deadline = time.monotonic() + 10
        while len(hop.seen) < n_read and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(hop.seen) == n_read
    blocks.close()
    hop.hang_up()
    while threading.active_count() > before and time.monotonic() < deadline + 10:
        time.sleep(0.01)
    assert threading.active_count() <= before
