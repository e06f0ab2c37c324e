"""Which rows in which order: a pure function of (seed, epoch, list of parts), whatever the number of readers.

Parts are permuted, then the row groups inside each block of parts; there are as few blocks as can be, of equal size.
Row group i of that sequence goes to stream i % C. Each stream is cut into windows of whole row groups, staggered so
that no two streams refill together, and each window is permuted by its own key, in runs of a few rows that lie side by
side in the file. Rows of a part are permuted when it is written, so a run is a random sample of its part, and runs mix
nearly as well as rows do while a batch takes many of them; but memory is copied twice as fast. Global batch t takes B/C
rows of each of C lanes, so its content does not depend on how many ranks share the lanes.

Lane c is stream c for as long as every stream lasts. Streams are not equally long: what the longer ones still hold
then, the tail, is put end to end and cut into C equal shares, one for every lane. So every row comes exactly once an
epoch, all lanes end together, and no more than one window per lane is ever in use.

Nothing here is walked: an epoch holds where its windows start (8 bytes each) and works out the rest when asked.
"""

import functools
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field

from sae.config import FrozenConfig
from sae.philox import philox
from sae.store.reading.shuffle import RowGroups, ShuffleSizes


class Cursor(FrozenConfig):
    """The next batch to read."""

    epoch: int = Field(0, ge=0)
    batch: int = Field(0, ge=0)


@dataclass(frozen=True)
class Window:
    """A run of row groups of one stream whose rows are permuted together.

    Attributes:
        start: position in its stream of the window's first row.
        parts, groups, rows: part, row group in the part, and rows, of every row group. [row groups] int64
    """

    stream: int
    index: int
    start: int
    parts: np.ndarray
    groups: np.ndarray
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of all its row groups."""
        return int(self.rows.sum())

    @property
    def places(self) -> list[tuple[int, int]]:
        """Part, and row group in it, of every row group."""
        return list(zip(self.parts.tolist(), self.groups.tolist(), strict=True))


class Run(NamedTuple):
    """Consecutive rows of a lane that come from one window. Sorted by when they are needed."""

    batch: int
    """The batch that takes the run's first row."""
    lane: int
    start: int
    """Position in the lane of the run's first row."""
    stream: int
    window: int
    """Index of the window in the stream."""
    offset: int
    """Position in the permuted window of the run's first row."""
    n_rows: int


class Permuted(NamedTuple):
    """How a window is permuted. Every row group is cut into runs of R rows; fewer than R others remain at its end."""

    runs: np.ndarray
    """Place of every run, row group after row group: it fills the rows [R place, R (place + 1)). [runs] int64"""
    others: np.ndarray
    """Place in rows of every other row; they come after all runs. [other rows] int64"""


class Lanes(NamedTuple):
    """How the rows of an epoch are divided over lanes and batches: of equal size, but for the last batch."""

    n_rows: int
    batch_rows: int
    n_lanes: int

    @property
    def n_batches(self) -> int:
        """Batches in an epoch; the last may be short."""
        return math.ceil(self.n_rows / self.batch_rows)

    @property
    def batch_share(self) -> int:
        """Rows that a whole batch takes of every lane."""
        return self.batch_rows // self.n_lanes

    def batch_size(self, batch: int) -> int:
        """Rows of a batch, of all lanes."""
        return min(self.batch_rows, self.n_rows - batch * self.batch_rows)

    def lane_rows(self, lane: int) -> int:
        """Rows of a lane in an epoch."""
        n_whole, rest = divmod(self.n_rows, self.batch_rows)
        return n_whole * self.batch_share + rest // self.n_lanes + (lane < rest % self.n_lanes)

    def rows_in_batch(self, lane: int, batch: int) -> int:
        """How many rows a batch takes of a lane: the next ones."""
        if (batch + 1) * self.batch_rows <= self.n_rows:
            return self.batch_share
        return min(self.batch_share, self.lane_rows(lane) - batch * self.batch_share)


def block_starts(n_parts: int, block_parts: int) -> np.ndarray:
    """Where each block of parts begins, and the end: no short one at the end, in which little would be mixed."""
    n_blocks = math.ceil(n_parts / block_parts)
    return np.arange(n_blocks + 1) * n_parts // n_blocks


class Epoch:
    """The order of one epoch.

    Takes 8 bytes a window, for a while 4 bytes a row group, and about a second for 10^7 row groups.

    Args:
        groups: sizes of the row groups of every part.
        batch_rows: B, rows of a global batch.
        seed, epoch: what the permutations are keyed by.
    """

    def __init__(self, groups: RowGroups, batch_rows: int, seed: int, epoch: int, shuffle: ShuffleSizes) -> None:
        self.seed, self.epoch = seed, epoch
        self.n_streams = shuffle.streams(batch_rows)
        self.groups_per_window = shuffle.groups_per_window(batch_rows)
        self.run_rows = shuffle.rows_per_run(batch_rows)
        """Rows that stay together when a window is permuted."""
        self._groups = groups
        self._parts = philox("parts", seed, epoch).permutation(len(groups.starts) - 1)
        # Where each block begins in the permuted parts, and in the sequence of row groups, and the end.
        self._block_parts = block_starts(len(self._parts), shuffle.block_parts)
        self._block_starts = np.cumsum(np.append(0, np.diff(groups.starts)[self._parts]))[self._block_parts]
        self._block = functools.lru_cache(maxsize=8)(self._order_of_block)
        self._window_starts = self._cut_windows()
        stream_rows = np.array([starts[-1] for starts in self._window_starts])
        self.lanes = Lanes(int(stream_rows.sum()), batch_rows, self.n_streams)
        per_batch = batch_rows // self.n_streams
        self._body_rows = int(stream_rows.min()) // per_batch * per_batch
        """Rows of every stream before the tail."""
        self._tail_of_stream = np.cumsum(np.append(0, stream_rows - self._body_rows))
        """Where in the tail the rest of each stream begins, and the end."""
        shares = [self.lanes.lane_rows(lane) - self._body_rows for lane in range(self.n_streams)]
        self._tail_of_lane = np.cumsum(np.append(0, shares))
        """Where in the tail the share of each lane begins, and the end."""

    def window(self, stream: int, index: int) -> Window:
        """A window of a stream."""
        first, last = self._cut(stream, index), self._cut(stream, index + 1)
        n_in_stream = len(range(stream, len(self._groups.rows), self.n_streams))
        numbers = self._sequence(stream + self.n_streams * np.arange(first, min(last, n_in_stream)))
        parts = np.searchsorted(self._groups.starts, numbers, side="right") - 1
        return Window(
            stream,
            index,
            int(self._window_starts[stream][index]),
            parts,
            numbers - self._groups.starts[parts],
            self._groups.rows[numbers].astype(np.int64),
        )

    def permuted(self, window: Window) -> "Permuted":
        """Where in the permuted window its runs and its other rows are."""
        generator = philox("window", self.seed, self.epoch, window.stream, window.index)
        n_runs = int((window.rows // self.run_rows).sum())
        runs = generator.permutation(n_runs)
        return Permuted(runs, n_runs * self.run_rows + generator.permutation(window.n_rows - n_runs * self.run_rows))

    def window_order(self, window: Window) -> np.ndarray:
        """Where in the window, as it lies in its files, each row of the permuted window comes from. [n_rows] int64"""
        to, within = self.permuted(window), np.arange(self.run_rows)
        order = np.empty(window.n_rows, np.int64)
        n_runs = n_others = start = 0
        for n_rows in window.rows.tolist():
            whole, other = divmod(n_rows, self.run_rows)
            runs = to.runs[n_runs : n_runs + whole, None] * self.run_rows + within
            order[runs.ravel()] = np.arange(start, start + whole * self.run_rows)
            order[to.others[n_others : n_others + other]] = np.arange(start + n_rows - other, start + n_rows)
            n_runs, n_others, start = n_runs + whole, n_others + other, start + n_rows
        return order

    def runs(self, batch: int, lanes: Iterable[int]) -> Iterator[Run]:
        """What the lanes read from a batch on, in the order in which batches need it."""
        return heapq.merge(*[self._runs_of_lane(lane, batch) for lane in lanes])

    def _runs_of_lane(self, lane: int, batch: int) -> Iterator[Run]:
        per_batch = self.lanes.batch_rows // self.n_streams
        position, end = batch * per_batch, self.lanes.lane_rows(lane)
        while position < end:
            stream, place, upto = lane, position, self._body_rows
            if position >= self._body_rows:
                in_tail = int(self._tail_of_lane[lane]) + position - self._body_rows
                stream = int(np.searchsorted(self._tail_of_stream, in_tail, side="right")) - 1
                place = self._body_rows + in_tail - int(self._tail_of_stream[stream])
                upto = min(end, position + int(self._tail_of_stream[stream + 1]) - in_tail)
            starts = self._window_starts[stream]
            window = int(np.searchsorted(starts, place, side="right")) - 1
            n_rows = min(upto - position, int(starts[window + 1]) - place)
            yield Run(position // per_batch, lane, position, stream, window, place - int(starts[window]), n_rows)
            position += n_rows

    def _cut(self, stream: int, index: int) -> int:
        """How many row groups of a stream lie before a window.

        The first window is shorter, by another amount in every stream, so refills alternate.
        """
        first = math.ceil(self.groups_per_window * (stream + 1) / self.n_streams)
        return 0 if index == 0 else first + (index - 1) * self.groups_per_window

    def _cut_windows(self) -> list[np.ndarray]:
        """Of every stream: where its windows start, and its end, in rows. [streams][windows + 1] int64"""
        sizes = np.empty_like(self._groups.rows)  # of the whole sequence
        for block, start in enumerate(self._block_starts[:-1]):
            sizes[start : self._block_starts[block + 1]] = self._groups.rows[self._block(block)]
        starts = []
        for stream in range(self.n_streams):
            rows = sizes[stream :: self.n_streams]
            cuts = np.append(0, np.arange(self._cut(stream, 1), len(rows), self.groups_per_window))
            n_rows = np.add.reduceat(rows, cuts, dtype=np.int64) if len(rows) else np.empty(0, np.int64)
            starts.append(np.append(0, np.cumsum(n_rows)))
        return starts

    def _sequence(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the row groups at ascending places of the sequence. [places] int64"""
        blocks = np.searchsorted(self._block_starts, places, side="right") - 1
        return np.concatenate(
            [
                self._block(int(block))[places[blocks == block] - self._block_starts[block]]
                for block in np.unique(blocks)
            ]
        )

    def _order_of_block(self, block: int) -> np.ndarray:
        """Numbers of the row groups of a block of parts, mixed. [row groups of the block] int64"""
        parts = self._parts[self._block_parts[block] : self._block_parts[block + 1]]
        firsts, counts = self._groups.starts[parts], self._groups.starts[parts + 1] - self._groups.starts[parts]
        ends = np.cumsum(counts)
        numbers = np.arange(ends[-1]) + np.repeat(firsts - (ends - counts), counts)
        return numbers[philox("row groups", self.seed, self.epoch, block).permutation(len(numbers))]
