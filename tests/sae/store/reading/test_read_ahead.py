"""The threads that read ahead: how they end, what they fail with, and how long somebody waited for them."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from sae.errors import DamagedError, StopRequested, TransientError
from sae.store.reading.loader import Loader
from sae.store.reading.order import Cursor, Epoch
from sae.store.reading.reader import Piece, RowGroupReader
from sae.store.reading.shuffle import RowGroups, ShuffleConfig
from sae.store.storage.filesystem import Storage
from tests.conftest import MakeSnapshot
from tests.sae.store.reading.numbered import (
    no_threads,
    numbered_parts,
    numbers,
    read,
    small_stores_are_like_large_ones,
)

Places = Sequence[tuple[int, int]]


@pytest.fixture(autouse=True, scope="module")
def small_stores() -> Iterator[None]:
    with small_stores_are_like_large_ones():
        yield


def test_closing_ends_all_threads_in_any_state(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(storage, numbered_parts([400]), row_group_rows=8)
    for n_batches in (0, 1, 30, 60):
        loader = Loader(storage, snapshot, 8, 0)
        read(loader, n_batches)
        loader.close()  # a second time
        assert no_threads()


def test_closing_does_not_wait_for_whole_windows(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(storage, numbered_parts([400]), row_group_rows=2)
    iter_pieces = RowGroupReader.iter_pieces
    reading, go_on, n_read = threading.Semaphore(0), threading.Event(), 0

    def slow(self: RowGroupReader, places: Places, buffer: np.ndarray) -> Iterator[Piece]:
        nonlocal n_read
        for piece in iter_pieces(self, places, buffer):
            n_read += 1
            reading.release()
            assert go_on.wait(30)
            yield piece

    monkeypatch.setattr(RowGroupReader, "iter_pieces", slow)
    loader = Loader(storage, snapshot, 8, 0, shuffle=ShuffleConfig(n_streams=1, window_row_groups=100))

    def call() -> None:
        with pytest.raises(StopRequested):
            next(loader)

    caller = threading.Thread(target=call)
    caller.start()
    assert all(reading.acquire(timeout=30) for _ in range(2))  # both windows, so no more are asked for
    closing = threading.Thread(target=loader._ahead.close)
    closing.start()
    while not loader._ahead._stopping.is_set():
        pass
    go_on.set()
    closing.join(30)
    caller.join(30)
    assert n_read <= 2  # one row group of each thread
    assert no_threads()


@pytest.mark.parametrize("error", [DamagedError("damaged", "ref", 0), TransientError("gone")])
def test_an_error_in_what_is_read_ahead_comes_in_its_batch_and_the_cursor_stays_before_it(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    snapshot = make_snapshot(storage, numbered_parts([300, 340]), row_group_rows=10)
    shuffle = ShuffleConfig(n_streams=4, window_row_groups=8)
    n_batches = 640 // 16
    whole = read(Loader(storage, snapshot, 16, 0, shuffle=shuffle), n_batches)
    groups = RowGroups.of(snapshot.row_groups)
    first = first_batch_that_needs(1, 11, Epoch(groups, 16, 0, 0, shuffle.sizes(groups, 12)))
    assert first > 0
    iter_pieces = RowGroupReader.iter_pieces

    def failing(self: RowGroupReader, places: Places, buffer: np.ndarray) -> Iterator[Piece]:
        for piece in iter_pieces(self, places, buffer):
            if places[piece.place] == (1, 11):
                raise error
            yield piece

    monkeypatch.setattr(RowGroupReader, "iter_pieces", failing)
    loader = Loader(storage, snapshot, 16, 0, shuffle=shuffle)
    got = [numbers(next(loader)) for _ in range(first)]
    with pytest.raises(type(error)) as raised:
        next(loader)
    assert raised.value is error
    assert loader.cursor == Cursor(epoch=0, batch=first)
    loader.close()
    monkeypatch.undo()
    rest = read(Loader(storage, snapshot, 16, 0, loader.cursor, shuffle), n_batches - first)
    assert got + rest == whole


def first_batch_that_needs(part: int, group: int, epoch: Epoch) -> int:
    for run in epoch.runs(0, range(epoch.n_streams)):
        window = epoch.window(run.stream, run.window)
        if (part, group) in zip(window.parts.tolist(), window.groups.tolist(), strict=True):
            return run.batch
    raise AssertionError("no window holds the row group")


def test_waiting_for_rows_is_counted(
    storage: Storage, make_snapshot: MakeSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(storage, numbered_parts([64]), row_group_rows=8)
    iter_pieces, seconds = RowGroupReader.iter_pieces, 0.05

    def slow(self: RowGroupReader, places: Places, buffer: np.ndarray) -> Iterator[Piece]:
        threading.Event().wait(seconds)
        yield from iter_pieces(self, places, buffer)

    monkeypatch.setattr(RowGroupReader, "iter_pieces", slow)
    loader = Loader(storage, snapshot, 8, 0)
    assert loader.waited_seconds == 0
    next(loader)
    assert loader.waited_seconds >= seconds
    loader.close()
