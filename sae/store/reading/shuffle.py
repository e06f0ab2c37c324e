"""How far apart the order spreads neighbouring rows, for a store of given sizes."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from pydantic import Field

from sae.config import FrozenConfig

WINDOW_BYTES = 2 << 30
BLOCK_BYTES = 64 << 30
RUN_BYTES = 8 << 10
"""Side by side in memory: from here on a scattered copy is as fast as any."""
RUNS_PER_SHARE = 64
"""At least so many runs make what a batch takes of a stream; where rows are small runs are shorter instead."""


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


class ShuffleSizes(NamedTuple):
    """How far apart neighbouring contexts are spread, in numbers."""

    n_streams: int
    window_row_groups: int
    block_parts: int
    run_rows: int = 1
    """At most so many rows stay together when a window is permuted."""

    def streams(self, batch_rows: int) -> int:
        """Streams C for batches of this size: as many as divide it evenly."""
        return math.gcd(self.n_streams, batch_rows)

    def groups_per_window(self, batch_rows: int) -> int:
        """Row groups of one window of one stream."""
        return max(1, self.window_row_groups // self.streams(batch_rows))

    def rows_per_run(self, batch_rows: int) -> int:
        """Rows that stay together when a window is permuted."""
        return max(1, min(self.run_rows, batch_rows // self.streams(batch_rows) // RUNS_PER_SHARE))


class ShuffleConfig(FrozenConfig):
    """How far apart neighbouring contexts are spread. Part of the result's identity; mixing.py says what it does."""

    n_streams: int = Field(8, gt=0)
    """Canonical streams C; 64 for large jobs. A batch takes an equal share of each."""
    window_row_groups: int | None = Field(None, gt=0)
    """Row groups in memory at once, over all streams. None: as many of the largest as 2 GiB hold."""
    block_parts: int | None = Field(None, gt=0)
    """At most so many parts have their row groups mixed with each other. None: as many as 64 GiB hold."""

    def streams(self, batch_rows: int) -> int:
        """As of `ShuffleSizes`: what ranks that read the same batches divide among them."""
        return math.gcd(self.n_streams, batch_rows)

    def sizes(self, groups: RowGroups, row_bytes: int) -> ShuffleSizes:
        """The numbers for a store whose vectors have `row_bytes` bytes."""
        largest_group = int(groups.rows.max()) * row_bytes
        part = max(1, groups.n_rows * row_bytes // (len(groups.starts) - 1))
        return ShuffleSizes(
            self.n_streams,
            self.window_row_groups or max(1, WINDOW_BYTES // largest_group),
            self.block_parts or max(1, BLOCK_BYTES // part),
            max(1, RUN_BYTES // row_bytes),
        )
