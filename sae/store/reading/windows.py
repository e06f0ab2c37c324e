"""Windows of the shuffled order in memory: those in use and the next few, read by threads of their own.

A row group is read piece by piece, and each piece is hashed and scattered to its rows' places in the permuted window
while it is in the processor's caches. So what a batch takes of a window lies side by side, drawing it is one plain
copy, and the shuffle costs the caller nothing.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import StopRequested
from sae.store.part.encoding import Decoder, as_values, stored_dtype
from sae.store.reading.order import Epoch, Run, Window
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage

WINDOWS_AHEAD = 2
"""Windows read before they are needed, each by a thread of its own."""
GROUPS_AT_ONCE = 8
"""Row groups that a thread asks for at once where the root is not local."""

VALUES_AT_ONCE = (1 << 15) - 1
"""Values decoded at once on the CPU. torch divides what is larger over its threads, and these wait for each other,
turning, for longer than the work takes where reading threads want the same cores."""


SHARES_CUT = 64
"""Batches whose rows are cut from a window by one call: that takes less than half as long as a call for each."""


class Share(NamedTuple):
    """Rows side by side in a window: all of them, or those that one batch takes."""

    stored: Tensor
    """As Decoder takes them. [n_rows, d_in]"""
    part: Tensor | None
    """Which of the decoder's encodings each row has, where they differ. [n_rows] int16"""
    decoder: Decoder


class HeldWindow:
    """The permuted rows of one window, while somebody needs them."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.key: tuple[int, int, int] | None = None
        self.n_users = 0
        self.rows: Future[Share] = Future()
        self.copied: torch.cuda.Event | None = None
        """On a GPU: the last copy of its rows; the memory is not used again before that is done."""

    def shares(self, run: Run, batch_share: int) -> Iterator[Share]:
        """The rows of a run, once they are read, cut where a batch ends: a batch takes `batch_share` rows of a lane."""
        rows, first = self.rows.result(), batch_share - run.start % batch_share
        its = slice(run.offset, run.offset + run.n_rows)
        parts = itertools.repeat(None) if rows.part is None else _cut(rows.part[its], first, batch_share)
        return map(Share, _cut(rows.stored[its], first, batch_share), parts, itertools.repeat(rows.decoder))


def _cut(rows: Tensor, first: int, size: int) -> Iterator[Tensor]:
    yield rows[:first]
    if first < len(rows):
        for some in rows[first:].split(SHARES_CUT * size):
            yield from some.split(size)


class Drawing:
    """Rows of windows on their way into a batch, as float32.

    Where nothing but their precision changes, they are copied by one call for all: the threads that read hold the
    interpreter's lock in turn, and every call would wait for it. Until `finish` the windows must not be given back.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._out: list[Tensor] = []
        self._is_divided = torch.get_num_threads() > 1

    def add(self, window: HeldWindow, share: Share, out: Tensor) -> None:
        """Take rows of a window. out: [n_rows, d_in] float32, on the device"""
        stored, part, decoder = share
        if out.is_cuda:
            decoder(stored, part, out=out)
            window.copied = torch.cuda.current_stream(out.device).record_event()
            return
        step = max(1, VALUES_AT_ONCE // out.shape[1]) if self._is_divided else out.shape[0]
        if decoder.is_plain and not self._is_divided:
            self._values.append(stored)
            self._out.append(out)
        elif decoder.is_plain:
            self._values += stored.split(step)
            self._out += out.split(step)
        else:
            parts = itertools.repeat(None) if part is None else part.split(step)
            for some, of_part, to in zip(stored.split(step), parts, out.split(step), strict=False):
                decoder(some, of_part, out=to)

    def finish(self) -> None:
        """Have all rows where they are wanted; on a GPU, when its stream has come so far."""
        if self._out:
            torch._foreach_copy_(self._out, self._values)
            self._out, self._values = [], []


class ReadAhead:
    """Hands out the windows of a sequence of runs, in that order, and reads the next ones meanwhile.

    Serves one thread. Memory: the windows that are taken and not given back, WINDOWS_AHEAD more, and for each of as
    many threads a piece, or the row groups that it asks for at once.

    Args:
        runs: what is needed, each with its epoch; may be endless.
        window_groups: row groups of a window.
        group_rows: rows of the largest row group.
        run_rows: rows that stay together when a window is permuted.
        device: where the rows are decoded. For a GPU the windows are page-locked: it copies from them by itself.
    """

    def __init__(
        self,
        storage: Storage,
        snapshot: Snapshot,
        runs: Iterator[tuple[Epoch, Run]],
        *,
        window_groups: int,
        group_rows: int,
        run_rows: int,
        device: torch.device,
    ) -> None:
        self.waited_seconds = 0.0
        """Time that `take` waited for a window."""
        self._snapshot, self._runs, self._device = snapshot, runs, device
        dtype = stored_dtype(snapshot.dtype)
        self._row_bytes = snapshot.d_in * dtype.itemsize
        self._window_rows = min(snapshot.n_rows, window_groups * group_rows)
        self._free: list[HeldWindow] = []
        self._open: dict[tuple[int, int, int], HeldWindow] = {}
        self._planned: deque[tuple[Run, HeldWindow]] = deque()
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(WINDOWS_AHEAD, thread_name_prefix="loader")
        self._reader = RowGroupReader(storage, snapshot)
        self._buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        if storage.is_local:
            buffer_rows = min(group_rows, self._reader.piece_rows(multiple=run_rows))
        else:
            buffer_rows = min(window_groups, GROUPS_AT_ONCE) * group_rows
        for _ in range(WINDOWS_AHEAD):
            self._buffers.put(np.empty((buffer_rows, snapshot.d_in), dtype))

    def take(self) -> tuple[Run, HeldWindow]:
        """The next run, and its window to be given back.

        Raises: as RowGroupReader.iter_pieces, if reading it did; IndexError after the last run.
        """
        self._plan()
        run, window = self._planned.popleft()
        started = time.perf_counter()
        window.rows.result()
        self.waited_seconds += time.perf_counter() - started
        self._plan()
        return run, window

    def give_back(self, window: HeldWindow) -> None:
        """End the use of a window: its memory is used again when all who took it have given it back."""
        window.n_users -= 1
        if window.n_users == 0:
            assert window.key is not None
            del self._open[window.key]
            self._free.append(window)

    def close(self) -> None:
        """Stop reading, after the row groups that are being read, close the files and let go of the memory."""
        self._stopping.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        self._buffers = queue.SimpleQueue()
        self._free.clear()
        self._open.clear()
        self._planned.clear()

    def _plan(self) -> None:
        """Have the next windows read."""
        while len(self._planned) < WINDOWS_AHEAD and (planned := next(self._runs, None)) is not None:
            epoch, run = planned
            key = (epoch.epoch, run.stream, run.window)
            # Near the end of an epoch lanes meet in one window.
            window = self._open.get(key)
            if window is None:
                window = self._open[key] = self._free.pop() if self._free else HeldWindow(self._new_memory())
                window.key = key
                window.rows = self._threads.submit(self._fill, window, epoch, run)
            window.n_users += 1
            self._planned.append((run, window))

    def _new_memory(self) -> Tensor:
        n_bytes = self._window_rows * self._row_bytes
        if self._device.type == "cuda":
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(n_bytes, np.uint8))  # numpy asks for huge pages: rows lie far apart

    def _fill(self, held: HeldWindow, epoch: Epoch, run: Run) -> Share:
        """Read a window, every row to where the order wants it."""
        if held.copied is not None:
            held.copied.synchronize()
            held.copied = None
        window = epoch.window(run.stream, run.window)
        to, run_rows = epoch.permuted(window), epoch.run_rows
        memory = held.memory[: window.n_rows * self._row_bytes]
        # numpy moves an item of any size at once, but the values of a row one by one.
        row, rows_together = np.dtype((np.void, self._row_bytes)), np.dtype((np.void, self._row_bytes * run_rows))
        to_run = memory.numpy()[: len(to.runs) * rows_together.itemsize].view(rows_together)
        to_row = memory.numpy().view(row)
        # Runs, and other rows, before each row group.
        runs_before, others_before = (np.append(0, np.cumsum(n)) for n in np.divmod(window.rows, run_rows))
        buffer = self._buffers.get()
        try:
            for index, first, rows in self._reader.iter_pieces(window.places, buffer):
                if self._stopping.is_set():
                    raise StopRequested("the loader is being closed")
                n_runs, n_others = divmod(len(rows), run_rows)
                if n_runs:
                    start = runs_before[index] + first // run_rows
                    together = rows[: n_runs * run_rows].reshape(n_runs, -1).view(rows_together)
                    to_run[to.runs[start : start + n_runs]] = together[:, 0]
                if n_others:  # at the end of the row group
                    start = others_before[index]
                    others = rows[n_runs * run_rows :].view(row)
                    to_row[to.others[start : start + n_others]] = others[:, 0]
        finally:
            self._buffers.put(buffer)
        stored = memory.view(torch.from_numpy(buffer[:0]).dtype).view(window.n_rows, self._snapshot.d_in)
        return Share(as_values(stored), *self._decoding(epoch, window))

    def _decoding(self, epoch: Epoch, window: Window) -> tuple[Tensor | None, Decoder]:
        """What decodes a window's rows, and which of its encodings each has, where they differ."""
        parts, index = np.unique(window.parts, return_inverse=True)
        encodings = [self._snapshot.parts[part].encoding for part in parts.tolist()]
        decoder = Decoder(encodings, self._snapshot.d_in, self._device)
        if decoder.is_same:
            return None, decoder
        of_row = np.repeat(index.astype(np.int16), window.rows)[epoch.window_order(window)]
        return torch.from_numpy(of_row), decoder
