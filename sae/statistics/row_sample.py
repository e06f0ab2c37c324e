"""A uniform sample of rows with every latent that fires on them: for what needs to see latents together.

A row is taken when its pseudo-random number lies under a threshold set by the snapshots' size, so samples of parts
add up to the sample of the whole, and all SAEs on a hook point look at the same rows.
"""

from typing import NamedTuple

import numpy as np

from sae.progress import Progress, silent
from sae.statistics.firings import Block, Rows
from sae.statistics.kept import derived_numbers, rank_in_run

MAX_LATENTS_PER_ROW = 512
"""Of a row with more, the strongest are kept."""
MIN_TOGETHER = 5
"""Latents that fire together on fewer sampled rows are no pair: their lift would be noise."""
BLOCK_PAIRS = 1 << 22
_SALT = 0x524F5753


class SampledRows(NamedTuple):
    """Sampled rows in order of their place, and the latents that fire on them."""

    rows: Rows
    offsets: np.ndarray
    """Where each row's latents begin, and their number at the end. [n_rows + 1] int64"""
    latent: np.ndarray
    """int32"""
    value: np.ndarray
    """float32"""


class RowSample:
    """Collects sampled rows.

    Args:
        share: of the rows, to be taken.
    """

    def __init__(self, share: float) -> None:
        self._below = int(min(max(share, 0.0), 1.0) * float(1 << 64))
        self._pieces: list[SampledRows] = []

    def add(self, block: Block, numbers: np.ndarray) -> None:
        """Take the block's share of rows. numbers: `row_numbers` of its rows. [n_rows]"""
        drawn = derived_numbers(numbers, _SALT)
        taken = np.ones(len(drawn), bool) if self._below >= 1 << 64 else drawn < np.uint64(self._below)
        if not taken.any():
            return
        inside = np.flatnonzero(taken[block.row])
        row, latent, value = block.row[inside], block.latent[inside], block.value[inside]
        order = np.lexsort((latent, -value, row))
        order = order[rank_in_run(row) < MAX_LATENTS_PER_ROW]  # `row` is sorted already
        per_row = np.bincount(row[order], minlength=len(taken))[taken]
        rows = Rows(*(column[taken] for column in block.rows))
        offsets = np.concatenate([[0], np.cumsum(per_row)])
        self._pieces.append(SampledRows(rows, offsets, latent[order], value[order]))

    def merge(self, sampled: SampledRows) -> None:
        """Add what another sample, of other rows, holds."""
        self._pieces.append(sampled)

    def read(self) -> SampledRows:
        """All rows, sorted by context and position."""
        if len(self._pieces) != 1:
            self._pieces = [_concatenate(self._pieces)]
        found = _sorted(self._pieces[0])
        self._pieces = [found]
        return found


class Coactivation(NamedTuple):
    """Latents that fire together more often than by chance. Parallel arrays [n], sorted by latent, best first."""

    latent: np.ndarray
    other: np.ndarray
    n_rows: np.ndarray
    """Sampled rows on which both fire."""
    share: np.ndarray
    """Share of the latent's sampled firings on which the other fires too. float64"""
    lift: np.ndarray
    """P(both) / (P(latent) P(other)) on the sampled rows. float64"""


def coactivation(sampled: SampledRows, d_sae: int, n: int, progress: Progress = silent) -> Coactivation:
    """The n latents that each latent fires together with most, by lift; pairs below MIN_TOGETHER rows are left out.

    Memory: blocks of latents times d_sae counts.
    """
    n_rows = len(sampled.rows.context)
    row = np.repeat(np.arange(n_rows), np.diff(sampled.offsets))
    fires = np.bincount(sampled.latent, minlength=d_sae)
    by_latent = np.argsort(sampled.latent, kind="stable")
    row_of, ends = row[by_latent], np.cumsum(fires)
    pieces: list[tuple[np.ndarray, ...]] = []
    block = max(1, BLOCK_PAIRS // d_sae)
    for start in range(0, d_sae if n else 0, block):
        stop = min(start + block, d_sae)
        mine = slice(ends[start] - fires[start], ends[stop - 1])
        rows, latent = row_of[mine], np.repeat(np.arange(start, stop), fires[start:stop])
        counts = np.zeros((stop - start, d_sae), np.int64)
        for first in range(0, len(rows), BLOCK_PAIRS // MAX_LATENTS_PER_ROW):
            some = slice(first, first + BLOCK_PAIRS // MAX_LATENTS_PER_ROW)
            other, size = _latents_of(sampled, rows[some])
            np.add.at(counts.reshape(-1), np.repeat(latent[some] - start, size) * d_sae + other, 1)
        counts[np.arange(stop - start), np.arange(start, stop)] = 0
        a, b = np.nonzero(counts >= MIN_TOGETHER)
        both = counts[a, b]
        a = a + start
        lift = both * float(n_rows) / (fires[a] * fires[b].astype(np.float64))
        order = np.lexsort((b, -both, -lift, a))
        order = order[rank_in_run(a[order]) < n]
        a, b, both, lift = a[order], b[order], both[order], lift[order]
        pieces.append((a, b, both, both / fires[a], lift))
        progress(stop, d_sae, "latents", "that fire together")
    if not pieces:
        empty = np.empty(0, np.int64)
        return Coactivation(empty, empty, empty, empty.astype(float), empty.astype(float))
    return Coactivation(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


def _latents_of(sampled: SampledRows, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents of each of `rows`, one row after the other, and how many each has."""
    first, size = sampled.offsets[rows], np.diff(sampled.offsets)[rows]
    place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
    return sampled.latent[place], size


def _concatenate(pieces: list[SampledRows]) -> SampledRows:
    if not pieces:
        types = (np.int64, np.int32, np.int64, np.int32, np.int32, np.uint8)
        rows = Rows(*(np.empty(0, dtype) for dtype in types))
        return SampledRows(rows, np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    sizes = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    return SampledRows(
        Rows(*(np.concatenate(columns) for columns in zip(*(piece.rows for piece in pieces), strict=True))),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([piece.latent for piece in pieces]),
        np.concatenate([piece.value for piece in pieces]),
    )


def _sorted(sampled: SampledRows) -> SampledRows:
    order = np.lexsort((sampled.rows.pos, sampled.rows.context))
    if np.array_equal(order, np.arange(len(order))):
        return sampled
    sizes = np.diff(sampled.offsets)[order]
    starts = sampled.offsets[order]
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(starts, sizes)
    return SampledRows(
        Rows(*(column[order] for column in sampled.rows)),
        np.concatenate([[0], np.cumsum(sizes)]),
        sampled.latent[place],
        sampled.value[place],
    )
