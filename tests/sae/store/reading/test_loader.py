"""Batches come in the order's order, from any cursor, with any sizes, divided over any number of ranks."""

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import ConfigError
from sae.store.reading import windows
from sae.store.reading.loader import Loader
from sae.store.reading.order import Cursor, Epoch
from sae.store.reading.reader import RowGroupReader
from sae.store.reading.shuffle import RowGroups, ShuffleConfig
from sae.store.reading.windows import ReadAhead
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot
from tests.sae.store.reading.numbered import no_threads, numbered_parts, numbers, read, small_stores_are_like_large_ones


@pytest.fixture(autouse=True, scope="module")
def small_stores() -> Iterator[None]:
    with small_stores_are_like_large_ones():
        yield


def read_ranks(loaders: list[Loader], n_batches: int) -> list[list[int]]:
    """Global batches, put together again: lane c is the next share of rank c % W."""
    batches = []
    for _ in range(n_batches):
        shares = [numbers(next(loader)) for loader in loaders]
        assert len({loader.cursor for loader in loaders}) == 1
        lanes = [loader._own for loader in loaders]
        counts = [
            [loader._lanes.rows_in_batch(lane.number, loader.cursor.batch - 1) for lane in own]
            for loader, own in zip(loaders, lanes, strict=True)
        ]
        assert list(map(sum, counts)) == list(map(len, shares))
        batch: list[int] = []
        for index in range(len(counts[0])):
            for rank, share in enumerate(shares):
                batch += share[: counts[rank][index]]
                del share[: counts[rank][index]]
        batches.append(batch)
    return batches


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    row_group_rows=st.integers(1, 20),
    batch_rows=st.integers(1, 16),
    n_streams=st.integers(1, 4),
    window=st.integers(1, 8),
    stop=st.integers(0, 30),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loader_follows_the_order_and_resumes_anywhere(
    memory_storage: Storage,
    make_snapshot: MakeSnapshot,
    sizes: list[int],
    row_group_rows: int,
    batch_rows: int,
    n_streams: int,
    window: int,
    stop: int,
) -> None:
    memory_storage.fs.store.clear()
    snapshot = make_snapshot(memory_storage, numbered_parts(sizes), row_group_rows=row_group_rows)
    if batch_rows > snapshot.n_rows:
        return
    shuffle = ShuffleConfig(n_streams=n_streams, window_row_groups=window)
    n_batches = -(-snapshot.n_rows // batch_rows)
    whole = read(Loader(memory_storage, snapshot, batch_rows, 7, shuffle=shuffle), 2 * n_batches + 2)
    for epoch in (0, 1):
        batches = whole[epoch * n_batches : (epoch + 1) * n_batches]
        assert sorted(row for batch in batches for row in batch) == list(range(sum(sizes)))

    stop = min(stop, n_batches)
    first = Loader(memory_storage, snapshot, batch_rows, 7, shuffle=shuffle)
    head = [numbers(next(first)) for _ in range(stop)]
    cursor = Cursor.model_validate_json(first.cursor.model_dump_json())
    first.close()
    rest = read(Loader(memory_storage, snapshot, batch_rows, 7, cursor, shuffle), 2 * n_batches + 2 - stop)
    assert head + rest == whole


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    row_group_rows=st.integers(1, 20),
    batch_rows=st.sampled_from([8, 16, 24]),
    window=st.integers(1, 24),
    stop=st.integers(0, 12),
    worlds=st.permutations([1, 2, 4, 8]),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_ranks_reads_the_same_global_batches_and_goes_on_from_any_others(
    memory_storage: Storage,
    make_snapshot: MakeSnapshot,
    sizes: list[int],
    row_group_rows: int,
    batch_rows: int,
    window: int,
    stop: int,
    worlds: list[int],
) -> None:
    memory_storage.fs.store.clear()
    snapshot = make_snapshot(memory_storage, numbered_parts(sizes), row_group_rows=row_group_rows)
    if batch_rows > snapshot.n_rows:
        return
    shuffle = ShuffleConfig(window_row_groups=window)
    n_batches = -(-snapshot.n_rows // batch_rows)

    def ranks(world: int, cursor: Cursor | None = None) -> list[Loader]:
        return [
            Loader(memory_storage, snapshot, batch_rows, 3, cursor, shuffle, rank=rank, world=world)
            for rank in range(world)
        ]

    wanted = n_batches + 2  # into the second epoch
    whole = read(*ranks(1), wanted)
    assert sorted(row for batch in whole[:n_batches] for row in batch) == list(range(sum(sizes)))
    got: list[list[int]] = []
    cursor = None
    for world in worlds:  # each reads on where the one before stopped, the last one all that remains
        loaders = ranks(world, cursor)
        n = wanted - len(got) if world == worlds[-1] else min(stop, wanted - len(got))
        got += read_ranks(loaders, n)
        cursor = loaders[-1].cursor
        for loader in loaders:
            loader.close()
    assert got == whole


def test_loader_takes_the_rows_that_the_order_names(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, numbered_parts([100, 80, 33]), row_group_rows=16)
    groups = RowGroups.of(snapshot.row_groups)
    epoch = Epoch(groups, 24, 5, 0, ShuffleConfig().sizes(groups, 12))
    starts = np.cumsum([0, 100, 80])
    expected: list[list[int]] = [[] for _ in range(epoch.lanes.n_batches)]
    for lane in range(epoch.n_streams):
        rows: list[int] = []
        for run in epoch.runs(0, [lane]):
            window = epoch.window(run.stream, run.window)
            inside = [
                int(starts[part] + group * 16 + row)
                for part, group, n in zip(window.parts, window.groups, window.rows, strict=True)
                for row in range(n)
            ]
            within = epoch.window_order(window)[run.offset : run.offset + run.n_rows]
            rows += [inside[i] for i in within]
        for batch, taken in enumerate(expected):
            count = epoch.lanes.rows_in_batch(lane, batch)
            taken += rows[:count]
            del rows[:count]
    assert read(Loader(storage, snapshot, 24, 5), epoch.lanes.n_batches) == expected


def test_a_part_that_another_tool_has_rewritten_comes_in_the_same_batches(
    storage: Storage, make_snapshot: MakeSnapshot
) -> None:
    snapshot = make_snapshot(storage, numbered_parts([100, 80, 33]), row_group_rows=16)
    expected = read(Loader(storage, snapshot, 24, 5), 20)
    path = storage.full(snapshot.parts[1].path)
    pq.write_table(pq.read_table(path), path, row_group_size=16, compression="zstd")
    assert read(Loader(storage, snapshot, 24, 5), 20) == expected


def test_a_batch_larger_than_the_data_is_refused(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, numbered_parts([10]))
    with pytest.raises(ConfigError, match=r"batch_rows = 11 but the snapshot .* has 10 rows"):
        Loader(storage, snapshot, 11, 0)


def test_ranks_that_cannot_share_the_streams_are_refused(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, numbered_parts([100]))
    with pytest.raises(ConfigError, match=r"world = 3 ranks .* 8 streams .* 24 rows .* Use 1, 2, 4, 8 ranks"):
        Loader(storage, snapshot, 24, 0, rank=0, world=3)
    with pytest.raises(ConfigError, match=r"world = 8 ranks .* 4 streams .* 12 rows .* Use 1, 2, 4 ranks"):
        Loader(storage, snapshot, 12, 0, rank=0, world=8)
    with pytest.raises(ConfigError, match="rank = 2 of world = 2"):
        Loader(storage, snapshot, 24, 0, rank=2, world=2)
    assert no_threads()


def test_a_batch_keeps_its_values_while_anything_refers_to_it(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, [part.astype(np.float16) for part in numbered_parts([640])], row_group_rows=8)
    loader = Loader(storage, snapshot, 8, 0, shuffle=ShuffleConfig(window_row_groups=16))
    whole = next(loader)
    some_rows, as_array = next(loader)[2:5], next(loader).numpy()
    expected = whole.clone(), some_rows.clone(), as_array.copy()
    addresses = set()
    for _ in range(60):
        batch = next(loader)
        assert batch.dtype == torch.float32
        addresses.add(batch.data_ptr())
    loader.close()
    assert torch.equal(whole, expected[0])
    assert torch.equal(some_rows, expected[1])
    assert np.array_equal(as_array, expected[2])
    assert len(addresses) == 2  # the others' memory is used in turns


@pytest.mark.parametrize("world", [1, 4])
def test_memory_does_not_grow_with_the_store(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    new_memory, sizes = ReadAhead._new_memory, []

    def counted(self: ReadAhead) -> torch.Tensor:
        sizes.append(memory := new_memory(self))
        return memory

    monkeypatch.setattr(ReadAhead, "_new_memory", counted)
    for n_parts in (6, 60):
        # Row groups of two sizes, so that streams end at different places and lanes share what is left.
        snapshot = make_snapshot(storage, numbered_parts([60, 41] * n_parts), row_group_rows=20)
        sizes.clear()
        shuffle = ShuffleConfig(window_row_groups=16)
        loader = Loader(storage, snapshot, 16, 0, shuffle=shuffle, rank=world - 1, world=world)
        for _ in range(2 * loader.batches_per_epoch):
            next(loader)
        loader.close()
        assert len(sizes) <= 8 // world + 2
        assert {len(memory) for memory in sizes} == {2 * 20 * 12}  # two row groups of 20 rows of three float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_of_parts_with_different_encodings_are_decoded(
    storage: Storage, make_snapshot: MakeSnapshot, dtype: str
) -> None:
    # int8 has another affine in every part, float16 another power of two.
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 5)).astype(np.float32) * 20_000 * 3**index for index, n in enumerate((90, 70, 81))]
    snapshot = make_snapshot(storage, parts, row_group_rows=16, dtype=dtype)
    assert dtype == "bfloat16" or len({part.layout.encoding for part in snapshot.parts}) == 3
    row_groups = RowGroupReader(storage, snapshot)
    stored = [row_groups.read_act(part, g) for part, sizes in enumerate(snapshot.row_groups) for g in range(len(sizes))]
    row_groups.close()
    loader = Loader(storage, snapshot, 20, 0, shuffle=ShuffleConfig(n_streams=2))
    batches = [next(loader).clone().numpy() for _ in range(loader.batches_per_epoch)]
    loader.close()
    assert sorted(np.concatenate(batches).tolist()) == sorted(np.concatenate(stored).astype(np.float32).tolist())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_batches_do_not_depend_on_how_many_threads_torch_has(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    # Two rows are converted at once where torch would divide more over threads; int8 has an affine for every part.
    monkeypatch.setattr(windows, "VALUES_AT_ONCE", 11)
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 5)).astype(np.float32) * 3**index for index, n in enumerate((90, 70, 81))]
    snapshot = make_snapshot(storage, parts, row_group_rows=16, dtype=dtype)
    batches, before = {}, torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        try:
            loader = Loader(storage, snapshot, 26, 0, shuffle=ShuffleConfig(n_streams=2))
            batches[n_threads] = torch.cat([next(loader) for _ in range(2 * loader.batches_per_epoch)])
            loader.close()
        finally:
            torch.set_num_threads(before)
    assert torch.equal(batches[1], batches[2])


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_host(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, numbered_parts([3000, 1111]), row_group_rows=64)
    host, device = (Loader(storage, snapshot, 48, 0, device=name) for name in ("cpu", "cuda"))
    for _ in range(3 * host.batches_per_epoch):
        expected, x = next(host), next(device)
        assert x.device.type == "cuda"
        assert torch.equal(x.cpu(), expected)
        assert host.cursor == device.cursor
    host.close()
    device.close()
