"""The shuffled order to batches: windows of row groups in memory, the next one read ahead in a thread."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sae.errors import ConfigError
from sae.store.encoding import stored_dtype
from sae.store.filesystem import Storage
from sae.store.order import Cursor, Epoch, ShuffleConfig, Window
from sae.store.reader import RowGroupReader
from sae.store.snapshot import Snapshot


class Loader:
    """Iterates batches of a snapshot, epoch after epoch, from any cursor.

    Memory: `window_row_groups` row groups, the window read ahead, and one batch.
    """

    def __init__(
        self,
        storage: Storage,
        snapshot: Snapshot,
        batch_rows: int,
        seed: int,
        cursor: Cursor | None = None,
        shuffle: ShuffleConfig | None = None,
    ) -> None:
        if batch_rows > snapshot.n_rows:
            raise ConfigError(
                f"batch_rows = {batch_rows} but the snapshot {snapshot.ref} has {snapshot.n_rows} rows. "
                f"Lower batch_rows, or extract more (activations.n_tokens)."
            )
        self.cursor = cursor or Cursor()
        """The next batch: store it, and another loader continues from it."""
        self.rows_per_epoch = snapshot.n_rows
        self._snapshot, self._batch_rows, self._seed, self._shuffle = snapshot, batch_rows, seed, shuffle
        self._reader = RowGroupReader(storage, snapshot)
        self._reading = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._batches = self._iterate()

    @property
    def batches_per_epoch(self) -> int:
        """Batches in the current epoch; the last may be short."""
        return self._epoch(self.cursor.epoch).n_batches

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next batch. [at most batch_rows, d_in] float32

        Raises: DamagedError as RowGroupReader.read_into, also for what was read ahead; the cursor stays before it.
        """
        return next(self._batches)

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        self._batches.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _epoch(self, epoch: int) -> Epoch:
        return Epoch(self._snapshot.row_groups, self._batch_rows, self._seed, epoch, self._shuffle)

    def _iterate(self) -> Generator[Tensor, None, None]:
        while True:
            epoch = self._epoch(self.cursor.epoch)
            streams = _Streams(self, epoch, self.cursor.batch)
            for batch in range(self.cursor.batch, epoch.n_body_batches):
                x = self._to_float(streams.body_batch(batch))
                self.cursor = Cursor(epoch=epoch.epoch, batch=batch + 1)
                yield x
            if self.cursor.batch < epoch.n_batches:
                tail = streams.tail()
                order = epoch.tail_order()
                for batch in range(self.cursor.batch, epoch.n_batches):
                    start, stop = epoch.tail_range(batch)
                    self.cursor = Cursor(epoch=epoch.epoch, batch=batch + 1)
                    yield self._to_float(tail[order[start:stop]])
            self.cursor = Cursor(epoch=self.cursor.epoch + 1)

    @staticmethod
    def _to_float(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(torch.float32, copy=True)

    def _read_window(self, window: Window) -> np.ndarray:
        rows = np.empty((window.n_rows, self._snapshot.d_in), stored_dtype(self._snapshot.dtype))
        start = 0
        with self._reading:
            for group in window.groups:
                self._reader.read_into(group.part, group.group, rows[start : start + group.n_rows])
                start += group.n_rows
        return rows


class _Streams:
    """The current window of every stream of one epoch."""

    def __init__(self, loader: Loader, epoch: Epoch, batch: int) -> None:
        self._loader, self._epoch = loader, epoch
        self._rows: dict[int, tuple[Window, np.ndarray, np.ndarray]] = {}
        self._out = np.empty((epoch.batch_rows, loader._snapshot.d_in), stored_dtype(loader._snapshot.dtype))
        position = epoch.body_range(min(batch, epoch.n_body_batches))[0]
        # Windows in the order in which they are needed, after the one each stream starts in.
        later = [window for windows in epoch.windows for window in windows if window.start > position]
        self._later = iter(sorted(later, key=self._needed))
        self._ahead: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._read_ahead()

    def body_batch(self, batch: int) -> np.ndarray:
        start, stop = self._epoch.body_range(batch)
        size = stop - start
        for stream in range(self._epoch.n_streams):
            self._take(stream, start, stop, self._out[stream * size : (stream + 1) * size])
        return self._out

    def tail(self) -> np.ndarray:
        out = np.empty((sum(self._epoch.tail_lengths), self._out.shape[1]), dtype=self._out.dtype)
        done = 0
        for stream in range(self._epoch.n_streams):
            start, stop = self._epoch.stream_tail(stream)
            self._take(stream, start, stop, out[done : done + stop - start])
            done += stop - start
        return out

    def _take(self, stream: int, start: int, stop: int, out: np.ndarray) -> None:
        """Rows at positions [start, stop) of a stream, which may span windows."""
        done = 0
        while start < stop:
            window, rows, order = self._window(stream, start)
            upto = min(stop, window.start + window.n_rows)
            chosen = order[start - window.start : upto - window.start]
            np.take(rows, chosen, axis=0, out=out[done : done + len(chosen)], mode="clip")
            done += len(chosen)
            start = upto

    def _window(self, stream: int, position: int) -> tuple[Window, np.ndarray, np.ndarray]:
        current = self._rows.get(stream)
        if current is None or position >= current[0].start + current[0].n_rows:
            window = self._epoch.windows[stream][self._epoch.window_at(stream, position)]
            future = self._ahead.pop((stream, window.index), None)
            # The first windows have not been read ahead; a hand-over to the thread would only cost time.
            rows = future.result() if future else self._loader._read_window(window)
            current = self._rows[stream] = (window, rows, self._epoch.window_order(window))
            self._read_ahead()
        return current

    def _needed(self, window: Window) -> tuple[int, int, int]:
        """When a window is first read: batch, then stream; in the tail stream by stream."""
        batch = min(window.start // self._epoch.rows_per_stream, self._epoch.n_body_batches)
        return batch, window.stream, window.index

    def _read_ahead(self) -> None:
        """Keep one window in flight: refills alternate between streams, so one is enough."""
        if self._ahead:
            return
        if (window := next(self._later, None)) is not None:
            self._ahead[window.stream, window.index] = self._loader._thread.submit(self._loader._read_window, window)


def open_loader(
    storage: Storage,
    snapshot: Snapshot,
    batch_rows: int,
    seed: int,
    cursor: Cursor | None = None,
    shuffle: ShuffleConfig | None = None,
) -> Loader:
    """Start reading a snapshot in the shuffled order of `seed`.

    Args:
        cursor: the next batch to yield; the first by default.

    Raises: ConfigError when a batch is larger than the snapshot.
    """
    return Loader(storage, snapshot, batch_rows, seed, cursor, shuffle)
