"""Which bucket every row of a data set goes to: rows are dealt round the buckets like cards.

The rows of a part are shuffled and dealt, one to each bucket in turn; the next part's deal goes on with the bucket
after the one where the last part's ended. So a bucket gets an equal share of every part and of the whole, to one row,
whatever the shuffles: how many rows lie where is known before any is read, and so is the memory that a bucket takes.
Which rows those are is as random as the shuffles.
"""

from collections.abc import Sequence

import numpy as np

from sae.errors import ConfigError

MAX_BUCKETS = 4096
"""Every dealt part has a piece of each bucket: its record names their places, and each is a request of its own."""


def count_buckets(n_rows: int, row_bytes: int, part_bytes: int) -> int:
    """Into how many buckets rows are dealt, so that the vectors of one are one row or take at most `part_bytes`.

    Raises: ConfigError when they are more than MAX_BUCKETS.
    """
    n_buckets = -(-n_rows // max(1, part_bytes // row_bytes))
    if n_buckets > MAX_BUCKETS:
        raise ConfigError(
            f"activations.remix.part_bytes: {part_bytes:,} cuts {n_rows:,} rows of {row_bytes:,} bytes into "
            f"{n_buckets:,} parts, and each is put together from pieces of all others: up to {MAX_BUCKETS:,}. Raise it "
            f"to {-(-n_rows // MAX_BUCKETS) * row_bytes:,}; a task holds one part in memory."
        )
    return n_buckets


class Deal:
    """How the rows of some parts are dealt.

    A dealt part is a part file with its rows grouped by bucket, that of its first row first. What a bucket gets of a
    part, a piece, is one or several whole row groups.

    Args:
        part_rows: rows of every part. [n_parts]
        row_group_rows: rows per row group of the dealt parts, at most.
        first_bucket: gets the first row; random, so that no bucket is likelier than another where parts are small.
    """

    def __init__(
        self, part_rows: Sequence[int] | np.ndarray, n_buckets: int, row_group_rows: int, first_bucket: int
    ) -> None:
        self.n_buckets, self._row_group_rows, self._first_bucket = n_buckets, row_group_rows, first_bucket
        self._starts = np.concatenate([[0], np.cumsum(part_rows, dtype=np.int64)])

    def bucket_rows(self, bucket: int) -> int:
        """Rows that a bucket gets of all parts."""
        return len(range(self._turn(0, bucket), int(self._starts[-1]), self.n_buckets))

    def destination(self, part: int, order: np.ndarray) -> np.ndarray:
        """Where in the dealt part each row of the part goes. [n_rows] int64

        Args:
            order: a permutation: row i is dealt as number order[i]. [n_rows]
        """
        slot, turn = np.divmod(order, self.n_buckets)
        starts = np.concatenate([[0], np.cumsum(self._piece_rows(part))])
        return starts[turn] + slot

    def row_groups(self, part: int) -> list[int]:
        """Rows of every row group of the dealt part."""
        most = self._row_group_rows
        return [min(most, n - start) for n in self._piece_rows(part).tolist() for start in range(0, n, most)]

    def groups_of(self, part: int, bucket: int) -> range:
        """The row groups of the dealt part that hold the piece of a bucket; none when it gets no row of the part."""
        turn = self._turn(part, bucket)
        groups = -(-self._piece_rows(part) // self._row_group_rows)
        first = int(groups[:turn].sum())
        return range(first, first + int(groups[turn]))

    def _turn(self, part: int, bucket: int) -> int:
        """How many buckets get a row of the part before this one does."""
        return (bucket - self._first_bucket - int(self._starts[part])) % self.n_buckets

    def _piece_rows(self, part: int) -> np.ndarray:
        """Rows of a part that go to each bucket, in the order of their turn. [n_buckets] int64"""
        n_rows = int(self._starts[part + 1] - self._starts[part])
        return (n_rows + self.n_buckets - 1 - np.arange(self.n_buckets)) // self.n_buckets
