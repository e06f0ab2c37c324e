"""The order of rows is pure, complete and seekable, and what its definition says."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.philox import philox
from sae.store.reading import shuffle
from sae.store.reading.order import Epoch
from sae.store.reading.shuffle import RowGroups, ShuffleConfig, ShuffleSizes

Row = tuple[int, int, int]
"""Part, row group, row in the group."""

SIZES = ShuffleSizes(n_streams=8, window_row_groups=64, block_parts=64)
row_groups = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=12).filter(any)
shuffles = st.builds(
    ShuffleSizes,
    n_streams=st.integers(1, 8),
    window_row_groups=st.integers(1, 16),
    block_parts=st.integers(1, 5),
    run_rows=st.integers(1, 4),
)


@pytest.fixture(autouse=True, scope="module")
def runs_in_small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "RUNS_PER_SHARE", 1)
        yield


def walk(
    row_groups: list[list[int]], batch_rows: int, seed: int, epoch: int, shuffle: ShuffleSizes
) -> list[list[list[Row]]]:
    """The rows of every batch by lane, walked the slow and obvious way. [batches][lanes][rows]"""
    parts = philox("parts", seed, epoch).permutation(len(row_groups)).tolist()
    sequence: list[tuple[int, int]] = []
    n_blocks = math.ceil(len(parts) / shuffle.block_parts)
    for block in range(n_blocks):
        members = parts[block * len(parts) // n_blocks : (block + 1) * len(parts) // n_blocks]
        inside = [(part, g) for part in members for g in range(len(row_groups[part]))]
        sequence += [inside[i] for i in philox("row groups", seed, epoch, block).permutation(len(inside))]

    n_lanes = math.gcd(shuffle.n_streams, batch_rows)
    per_window = max(1, shuffle.window_row_groups // n_lanes)
    run_rows = min(shuffle.run_rows, batch_rows // n_lanes)
    streams: list[list[Row]] = []
    for stream in range(n_lanes):
        groups, rows, cut, take = (
            sequence[stream::n_lanes],
            list[Row](),
            0,
            math.ceil(per_window * (stream + 1) / n_lanes),
        )
        for window in itertools.count():
            if not groups[cut : cut + take]:
                break
            runs, others = [], []
            for part, g in groups[cut : cut + take]:
                inside = [(part, g, row) for row in range(row_groups[part][g])]
                whole = len(inside) // run_rows * run_rows
                runs += [inside[start : start + run_rows] for start in range(0, whole, run_rows)]
                others += [[row] for row in inside[whole:]]
            generator = philox("window", seed, epoch, stream, window)
            for units in (runs, others):
                places = generator.permutation(len(units)).tolist()
                rows += [row for _, unit in sorted(zip(places, units, strict=True)) for row in unit]
            cut, take = cut + take, per_window
        streams.append(rows)

    per_lane = batch_rows // n_lanes
    body = min(map(len, streams)) // per_lane * per_lane
    tail = [row for stream in streams for row in stream[body:]]
    n_rows = sum(map(len, streams))
    lanes: list[list[Row]] = []
    for lane in range(n_lanes):
        n_last = len(range(lane, n_rows % batch_rows, n_lanes))  # the last batch is dealt out row by row
        share = n_rows // batch_rows * per_lane + n_last - body
        lanes.append(streams[lane][:body] + tail[:share])
        tail = tail[share:]
    assert not tail
    n_batches = math.ceil(n_rows / batch_rows)
    return [[lane[batch * per_lane : (batch + 1) * per_lane] for lane in lanes] for batch in range(n_batches)]


def rows_of_batches(epoch: Epoch, first: int, lanes: list[int]) -> list[list[list[Row]]]:
    """The rows of every batch from `first` on by lane, from the runs and windows that the epoch computes."""
    rows: dict[int, list[Row]] = {lane: [] for lane in lanes}
    for run in epoch.runs(first, lanes):
        window = epoch.window(run.stream, run.window)
        inside = [
            (part, group, row)
            for part, group, n in zip(window.parts.tolist(), window.groups.tolist(), window.rows.tolist(), strict=True)
            for row in range(n)
        ]
        order = epoch.window_order(window)[run.offset : run.offset + run.n_rows]
        assert len(order) == run.n_rows
        rows[run.lane] += [inside[i] for i in order]
    batches = []
    for batch in range(first, epoch.lanes.n_batches):
        counts = {lane: epoch.lanes.rows_in_batch(lane, batch) for lane in lanes}
        batches.append([rows[lane][: counts[lane]] for lane in lanes])
        rows = {lane: rows[lane][counts[lane] :] for lane in lanes}
    assert not any(rows.values())
    return batches


@given(row_groups, st.integers(1, 24), st.integers(0, 99), st.integers(0, 3), shuffles, st.integers(0, 20))
@settings(max_examples=200)
def test_an_epoch_and_a_seek_into_it_equal_the_walk(
    groups: list[list[int]], batch_rows: int, seed: int, number: int, shuffle: ShuffleSizes, first: int
) -> None:
    expected = walk(groups, batch_rows, seed, number, shuffle)
    epoch = Epoch(RowGroups.of(groups), batch_rows, seed, number, shuffle)
    assert epoch.lanes.n_batches == len(expected)
    lanes = list(range(epoch.n_streams))
    assert rows_of_batches(epoch, 0, lanes) == expected
    assert rows_of_batches(epoch, first, lanes) == expected[first:]
    assert rows_of_batches(epoch, first, lanes[::2]) == [batch[::2] for batch in expected[first:]]


@given(row_groups, st.integers(1, 24), shuffles)
def test_every_row_comes_exactly_once_an_epoch(groups: list[list[int]], batch_rows: int, shuffle: ShuffleSizes) -> None:
    epoch = Epoch(RowGroups.of(groups), batch_rows, 1, 0, shuffle)
    batches = rows_of_batches(epoch, 0, list(range(epoch.n_streams)))
    sizes = [sum(map(len, batch)) for batch in batches]
    rows = [row for batch in batches for lane in batch for row in lane]
    assert sorted(rows) == [(p, g, r) for p, part in enumerate(groups) for g, n in enumerate(part) for r in range(n)]
    assert sizes[:-1] == [batch_rows] * (len(batches) - 1)
    assert 0 < sizes[-1] <= batch_rows


@given(row_groups, st.integers(1, 24), shuffles)
def test_runs_come_when_batches_need_them(groups: list[list[int]], batch_rows: int, shuffle: ShuffleSizes) -> None:
    epoch = Epoch(RowGroups.of(groups), batch_rows, 1, 0, shuffle)
    runs = list(epoch.runs(0, range(epoch.n_streams)))
    per_lane = batch_rows // epoch.n_streams
    assert [run.start // per_lane for run in runs] == sorted(run.batch for run in runs)
    assert all(a.lane <= b.lane for a, b in itertools.pairwise(runs) if a.batch == b.batch)


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    groups = RowGroups.of([[8, 8, 8, 5]] * 6)
    first, again, other_seed, other_epoch = (
        rows_of_batches(Epoch(groups, 16, seed, epoch, SIZES), 0, list(range(8)))
        for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again
    assert first != other_seed
    assert first != other_epoch


def test_batches_mix_all_streams_and_most_parts() -> None:
    epoch = Epoch(RowGroups.of([[16] * 8 for _ in range(8)]), 64, 0, 0, SIZES)
    batches = rows_of_batches(epoch, 0, list(range(8)))
    assert np.mean([len({row[0] for lane in batch for row in lane}) for batch in batches]) > 5  # a sequence has 1


def test_windows_of_different_streams_do_not_end_together() -> None:
    epoch = Epoch(RowGroups.of([[10] * 64 for _ in range(8)]), 80, 0, 0, SIZES)
    assert len({epoch.window(stream, 0).n_rows for stream in range(8)}) == 8


def test_windows_bound_the_rows_in_memory() -> None:
    shuffle = ShuffleSizes(n_streams=4, window_row_groups=16, block_parts=64)
    epoch = Epoch(RowGroups.of([[10] * 20 for _ in range(10)]), 40, 0, 0, shuffle)
    largest: dict[int, int] = {}
    for run in epoch.runs(0, range(4)):
        window = epoch.window(run.stream, run.window)
        largest[run.lane] = max(largest.get(run.lane, 0), len(window.rows))
    assert sum(largest.values()) <= 16


def test_lanes_stay_in_one_window_each_where_streams_are_uneven() -> None:
    # One stream of two holds nearly everything: the tail is nearly the whole epoch, and is shared evenly.
    groups = RowGroups.of([[1, 100] for _ in range(200)])
    epoch = Epoch(groups, 4, 3, 0, ShuffleSizes(n_streams=2, window_row_groups=4, block_parts=1))
    runs = list(epoch.runs(0, range(2)))
    assert abs(sum(run.n_rows for run in runs if run.lane == 0) - groups.n_rows / 2) <= 1
    needed = {(run.stream, run.window) for run in runs}
    assert len(runs) <= len(needed) + 2 * epoch.n_streams  # next to no window is read for two lanes


@pytest.mark.slow
def test_an_epoch_of_a_million_parts_opens_and_seeks() -> None:
    n_parts = 1_000_000
    rows = np.full(32 * n_parts, 4096, np.int32)
    rows[31::32] = 1000
    groups = RowGroups(rows, 32 * np.arange(n_parts + 1))
    epoch = Epoch(groups, 4096, 0, 0, SIZES)
    middle = epoch.lanes.n_batches // 2
    runs = list(itertools.islice(epoch.runs(middle, range(8)), 8))
    assert [run.lane for run in runs] == list(range(8))
    for run in runs:
        window = epoch.window(run.stream, run.window)
        place = window.start + run.offset
        assert place == middle * 512
        assert window.start <= place < window.start + window.n_rows
        assert rows[groups.starts[window.parts] + window.groups].tolist() == window.rows.tolist()
    last = list(epoch.runs(epoch.lanes.n_batches - 1, range(8)))
    assert sum(run.n_rows for run in last) == groups.n_rows % 4096


def test_memory_and_blocks_are_sized_in_bytes_unless_told() -> None:
    laptop = RowGroups.of([[4096] * 16] * 3)
    assert ShuffleConfig().sizes(laptop, 1024) == ShuffleSizes(8, 512, 1024, 8)  # row groups of 4 MiB, parts of 64 MiB
    assert ShuffleConfig().sizes(laptop, 8 * 1024) == ShuffleSizes(8, 64, 128, 1)
    told = ShuffleConfig(n_streams=4, window_row_groups=3, block_parts=2)
    assert told.sizes(laptop, 1024) == ShuffleSizes(4, 3, 2, 8)


def test_runs_are_shorter_where_a_batch_takes_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "RUNS_PER_SHARE", 64)
    sizes = ShuffleSizes(8, 512, 1024, run_rows=8)
    assert [sizes.rows_per_run(batch) for batch in (8, 512, 1024, 2048, 4096, 1 << 16)] == [1, 1, 2, 4, 8, 8]


def test_philox_streams_differ_by_purpose_and_key() -> None:
    draws = [philox(*key).integers(0, 1 << 62) for key in (("a", 1), ("a", 2), ("b", 1), ("a", "1"))]
    assert len(set(draws)) == 4
    assert philox("a", 1).integers(0, 1 << 62) == draws[0]
