"""Which rows in which order: a pure function of (seed, epoch, list of parts), whatever the number of readers.

Parts are permuted, then the row groups inside each block of parts; there are as few blocks as can be, of equal size.
Row group i of that sequence goes to stream i % C. Each stream is cut into windows of whole row groups, staggered so
that no two streams refill together, and each window's rows are permuted by their own key. Global batch t takes B/C rows
of each of C lanes, so its content does not depend on how many ranks share the lanes.

Lane c is stream c for as long as every stream lasts. Streams are not equally long: what the longer ones still hold
then, the tail, is put end to end and cut into C equal shares, one for every lane. So every row comes exactly once an
epoch, all lanes end together, and no more than one window per lane is ever in use.

Nothing here is walked: an epoch holds where its windows start (8 bytes each) and works out the rest when asked.
"""

import functools
import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from pydantic import Field

from sae.config import FrozenConfig

WINDOW_BYTES = 2 << 30
BLOCK_BYTES = 64 << 30


def philox(purpose: str, *key: str | int) -> np.random.Generator:
    """A generator keyed by what the numbers are for. Equal keys give equal streams on every machine."""
    key_bytes = hashlib.sha256(json.dumps([purpose, *key]).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key_bytes, "little")))


class ShuffleSizes(NamedTuple):
    """How far apart neighbouring contexts are spread, in numbers."""

    n_streams: int
    window_row_groups: int
    block_parts: int

    def streams(self, batch_rows: int) -> int:
        """Streams C for batches of this size: as many as divide it evenly."""
        return math.gcd(self.n_streams, batch_rows)

    def groups_per_window(self, batch_rows: int) -> int:
        """Row groups of one window of one stream."""
        return max(1, self.window_row_groups // self.streams(batch_rows))


class ShuffleConfig(FrozenConfig):
    """How far apart neighbouring contexts are spread. Part of the result's identity; mixing.py says what it does."""

    n_streams: int = Field(8, gt=0)
    """Canonical streams C; 64 for large jobs. A batch takes an equal share of each."""
    window_row_groups: int | None = Field(None, gt=0)
    """Row groups in memory at once, over all streams. None: as many of the largest as 2 GiB hold."""
    block_parts: int | None = Field(None, gt=0)
    """At most so many parts have their row groups mixed with each other. None: as many as 64 GiB hold."""

    def sizes(self, groups: "RowGroups", row_bytes: int) -> ShuffleSizes:
        """The numbers for a store whose vectors have `row_bytes` bytes."""
        largest_group = int(groups.rows.max()) * row_bytes
        part = max(1, groups.n_rows * row_bytes // (len(groups.starts) - 1))
        return ShuffleSizes(
            self.n_streams,
            self.window_row_groups or max(1, WINDOW_BYTES // largest_group),
            self.block_parts or max(1, BLOCK_BYTES // part),
        )


class Cursor(FrozenConfig):
    """The next batch to read."""

    epoch: int = Field(0, ge=0)
    batch: int = Field(0, ge=0)


class RowGroups(NamedTuple):
    """The sizes of all row groups of a list of parts."""

    rows: np.ndarray
    """Rows of every row group, part after part. [row groups] integers"""
    starts: np.ndarray
    """Where in `rows` each part begins, and the end. [parts + 1] int64"""

    @classmethod
    def of(cls, parts: Iterable[Sequence[int]]) -> Self:
        """From the sizes per part: [part][group]."""
        sizes = [np.asarray(groups, np.int32) for groups in parts]
        starts = np.cumsum([0, *map(len, sizes)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int32), *sizes]), starts)

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return int(self.rows.sum(dtype=np.int64))


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


class Lanes(NamedTuple):
    """How the rows of an epoch are divided over lanes and batches: of equal size, but for the last batch."""

    n_rows: int
    batch_rows: int
    n_lanes: int

    @property
    def n_batches(self) -> int:
        """Batches in an epoch; the last may be short."""
        return math.ceil(self.n_rows / self.batch_rows)

    def lane_rows(self, lane: int) -> int:
        """Rows of a lane in an epoch."""
        n_whole, rest = divmod(self.n_rows, self.batch_rows)
        return n_whole * (self.batch_rows // self.n_lanes) + rest // self.n_lanes + (lane < rest % self.n_lanes)

    def rows_in_batch(self, lane: int, batch: int) -> int:
        """How many rows a batch takes of a lane: the next ones."""
        per_batch = self.batch_rows // self.n_lanes
        return min(per_batch, self.lane_rows(lane) - batch * per_batch)


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

    def window_order(self, window: Window) -> np.ndarray:
        """Where in the window each of its rows comes from. [n_rows] int64"""
        return philox("window", self.seed, self.epoch, window.stream, window.index).permutation(window.n_rows)

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
