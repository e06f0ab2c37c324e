"""Which latent of one SAE is which of another: by decoder direction, by firing together, and what chance would give.

Nothing here is as large as [d_a, d_b]: matrices are made and reduced block by block.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

NONE = 0xFFFF_FFFF
"""Index that says: no match."""
BLOCK_ELEMENTS = 1 << 22
"""Elements of the largest temporary matrix."""
MIN_FIRINGS = 5
"""On the shared rows, of both latents: below it, one row more or less moves the correlation by a fifth."""
SAMPLED = 2048
"""Latents that stand for all where chance is measured."""

DEAD, ONLY, NEAR, MATCHED, PARENT, PART = range(6)
"""What a latent is in a comparison: never fired; without a counterpart; near one, but in no relation named here;
one-to-one; with several parts on the other side; one of those parts."""
CONTAINED = 0.5
"""A part fires where its whole does: on at least this share of the part's firings the whole fires too."""


@dataclass(frozen=True)
class Firings:
    """Which latents fire on which rows, by row."""

    latents: np.ndarray
    """All rows' latents, one row after another. [n_firings] int64"""
    ends: np.ndarray
    """Where each row begins, and the end. [n_rows + 1] int64"""
    n_latents: int

    @property
    def n_rows(self) -> int:
        """How many rows there are, silent ones too."""
        return len(self.ends) - 1

    @property
    def counts(self) -> np.ndarray:
        """Rows on which each latent fires. [n_latents] int64"""
        return np.bincount(self.latents, minlength=self.n_latents)

    @property
    def rows(self) -> np.ndarray:
        """The row of each firing. [n_firings] int64"""
        return np.repeat(np.arange(self.n_rows), np.diff(self.ends))

    def on_other_rows(self, generator: np.random.Generator) -> "Firings":
        """The same rows in another order: frequencies and pairs within the SAE stay, meetings with another SAE are
        left to chance."""
        order = generator.permutation(self.n_rows)
        lengths = np.diff(self.ends)[order]
        return Firings(
            self.latents[_ranges(self.ends[:-1][order], lengths)],
            np.concatenate([[0], lengths.cumsum()]),
            self.n_latents,
        )


@dataclass(frozen=True)
class Matches:
    """For each latent of one SAE its best match in another."""

    index: np.ndarray
    """[n] int64; NONE where nothing was comparable."""
    score: np.ndarray
    """Cosine or correlation. [n] float64; NaN where there is no match."""


@torch.inference_mode()
def match_decoders(a: np.ndarray, b: np.ndarray, live_a: np.ndarray, live_b: np.ndarray) -> tuple[Matches, Matches]:
    """Best matches by cosine of decoder rows, both ways, among latents that are live.

    Args:
        a, b: decoder rows; a row of zeros has cosine 0 with all. [d_a, d_in], [d_b, d_in] float32
        live_a, live_b: [d_a], [d_b] bool
    """
    ids_a, ids_b = np.flatnonzero(live_a), np.flatnonzero(live_b)
    unit_a, unit_b = (torch.nn.functional.normalize(torch.from_numpy(rows), dim=1) for rows in (a[ids_a], b[ids_b]))
    of_a, of_b = _Best(len(ids_a)), _Best(len(ids_b))
    block = max(1, BLOCK_ELEMENTS // max(1, len(ids_b)))
    for start in range(0, len(ids_a) if len(ids_b) else 0, block):
        cosines = (unit_a[start : start + block] @ unit_b.T).clamp_(-1, 1)
        mine = np.arange(start, start + len(cosines))
        best, index = (found.numpy() for found in cosines.max(dim=1))
        of_a.offer(mine, index, best)
        best, index = (found.numpy() for found in cosines.max(dim=0))
        of_b.offer(np.arange(len(best)), mine[index], best)
    return of_a.matches(ids_a, ids_b, len(a)), of_b.matches(ids_b, ids_a, len(b))


def random_cosines(n_latents: int, n_others: int, d_in: int, generator: np.random.Generator) -> np.ndarray:
    """Best cosines with a dictionary of `n_others` random directions: what matching finds where nothing is shared.

    Returns: of at most SAMPLED directions. By symmetry it does not matter whose directions are matched. [n] float64
    """
    rows = generator.standard_normal((min(n_latents, SAMPLED), d_in), dtype=np.float32)
    others = generator.standard_normal((n_others, d_in), dtype=np.float32)
    found, _ = match_decoders(rows, others, np.ones(len(rows), bool), np.ones(n_others, bool))
    return found.score


def match_firings(a: Firings, b: Firings) -> tuple[Matches, Matches]:
    """Best matches by correlation (phi) of firing on the rows that both share, both ways.

    Only pairs that fire together on a row, of latents with MIN_FIRINGS: no other pair can be a best match worth naming.
    """
    n_rows, counts_a, counts_b = a.n_rows, a.counts, b.counts
    of_a, of_b = _Best(a.n_latents), _Best(b.n_latents)
    for start, together in _blocks_together(a, b):
        row, column = np.nonzero(together)
        latent, n_both = row + start, together[row, column]
        usable = (counts_a[latent] >= MIN_FIRINGS) & (counts_b[column] >= MIN_FIRINGS)
        latent, column = latent[usable], column[usable]
        correlation = phi(n_rows, counts_a[latent], counts_b[column], n_both[usable])
        of_a.offer(latent, column, correlation)
        of_b.offer(column, latent, correlation)
    return (
        of_a.matches(np.arange(a.n_latents), np.arange(b.n_latents), a.n_latents),
        of_b.matches(np.arange(b.n_latents), np.arange(a.n_latents), b.n_latents),
    )


def chance_of_firings(a: Firings, b: Firings, generator: np.random.Generator) -> np.ndarray:
    """Best correlations of a sample of a's latents with b on shuffled rows: what unrelated latents of these
    frequencies reach. [<= SAMPLED] float64"""
    kept = np.sort(generator.permutation(a.n_latents)[:SAMPLED])
    new_id = np.full(a.n_latents, -1)
    new_id[kept] = np.arange(len(kept))
    chosen = new_id[a.latents] >= 0
    ends = np.concatenate([[0], np.cumsum(np.bincount(a.rows[chosen], minlength=a.n_rows))])
    sample = Firings(new_id[a.latents[chosen]], ends, len(kept))
    found, _ = match_firings(sample, b.on_other_rows(generator))
    return found.score


def rows_together(a: Firings, b: Firings, of_a: np.ndarray, of_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """On how many rows each latent fires together with one other.

    Args:
        of_a: for each latent of a one of b, or NONE. [d_a]
        of_b: for each latent of b one of a, or NONE. [d_b]

    Returns: counts, 0 where there is no other. [d_a], [d_b] int64
    """
    found_a, found_b = np.zeros(a.n_latents, np.int64), np.zeros(b.n_latents, np.int64)
    for start, together in _blocks_together(a, b):
        stop = start + len(together)
        mine = np.flatnonzero(of_a[start:stop] != NONE)
        found_a[start + mine] = together[mine, of_a[start + mine]]
        theirs = np.flatnonzero((of_b >= start) & (of_b < stop))
        found_b[theirs] = together[of_b[theirs] - start, theirs]
    return found_a, found_b


def phi(n_rows: int, n_a: np.ndarray, n_b: np.ndarray, n_both: np.ndarray) -> np.ndarray:
    """Pearson correlation of two yes-or-no variables from their counts; NaN where one never or always fires."""
    n_a, n_b, n_both = (np.asarray(n, np.float64) for n in (n_a, n_b, n_both))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(n_a) * np.sqrt(n_rows - n_a) * np.sqrt(n_b) * np.sqrt(n_rows - n_b)
        found: np.ndarray = (n_rows * n_both - n_a * n_b) / spread
    return found


@dataclass(frozen=True)
class Side:
    """What the classes of one SAE's latents are decided by."""

    matches: Matches
    linked: np.ndarray
    """Near enough to its match, and firing where it fires: can be a part of it. [n] bool"""
    live: np.ndarray
    """[n] bool"""


def linked(matches: Matches, inside: np.ndarray, above: float) -> np.ndarray:
    """Whether each latent can be a part of its match.

    Args:
        inside: share of the latent's firings on which its match fires too; NaN (not known) does not speak against it.
    """
    found: np.ndarray = (np.nan_to_num(matches.score, nan=-1) >= above) & ~(inside < CONTAINED)
    return found


def classify(a: Side, b: Side, matched_above: float, near_above: float) -> tuple[np.ndarray, np.ndarray]:
    """Put every latent of both SAEs in one class. The same for (a, b) and (b, a). [d_a], [d_b] uint8

    A latent with two or more linked latents on the other side is their PARENT (for a: it splits; for b: they merge)
    and they are its PARTs. Of the rest, mutual best matches from `matched_above` on are MATCHED.
    """
    parents = [_n_linked(other, len(one.live)) >= 2 for one, other in ((a, b), (b, a))]
    found = []
    for one, parent, of_other in ((a, parents[0], parents[1]), (b, parents[1], parents[0])):
        score = np.nan_to_num(one.matches.score, nan=-1)
        classes = np.where(score >= near_above, NEAR, ONLY).astype(np.uint8)
        part = one.linked.copy()
        part[part] = of_other[one.matches.index[part]]
        classes[part] = PART
        classes[parent] = PARENT
        classes[~one.live] = DEAD
        found.append(classes)
    pairs = mutual(a.matches, b.matches)
    partners = a.matches.index[pairs]
    free = (a.matches.score[pairs] >= matched_above) & (found[0][pairs] <= NEAR) & (found[1][partners] <= NEAR)
    found[0][pairs[free]] = MATCHED
    found[1][partners[free]] = MATCHED
    return found[0], found[1]


def mutual(a: Matches, b: Matches) -> np.ndarray:
    """The latents of a whose best match has them as its best match. [<= d_a] int64"""
    ids = np.flatnonzero(a.index != NONE)
    found: np.ndarray = ids[b.index[a.index[ids]] == ids]
    return found


def _n_linked(side: Side, n_others: int) -> np.ndarray:
    """How many latents of `side` are linked to each latent of the other. [n_others]"""
    return np.bincount(side.matches.index[side.linked], minlength=n_others)


class _Best:
    """The best score of each latent so far; the lowest index wins a tie."""

    def __init__(self, n: int) -> None:
        self.score = np.full(n, -np.inf)
        self.index = np.full(n, NONE, np.int64)

    def offer(self, ids: np.ndarray, others: np.ndarray, score: np.ndarray) -> None:
        """Pairs in any order; an id may come often. NaN is no score."""
        before = self.score.copy()
        np.fmax.at(self.score, ids, score)
        hits = np.flatnonzero((score == self.score[ids]) & (score > before[ids]))
        hits = hits[np.argsort(-others[hits], kind="stable")]  # of equal hits the last one written stays
        self.index[ids[hits]] = others[hits]

    def matches(self, ids: np.ndarray, ids_of_others: np.ndarray, n: int) -> Matches:
        """Back in the ids of all latents. ids: [of this SAE], ids_of_others: [of the other]."""
        index, score = np.full(n, NONE, np.int64), np.full(n, np.nan)
        there = np.isfinite(self.score)
        index[ids[there]] = ids_of_others[self.index[there]]
        score[ids[there]] = self.score[there]
        return Matches(index, score)


def _blocks_together(a: Firings, b: Firings) -> Iterator[tuple[int, np.ndarray]]:
    """(first latent, rows on which each latent of a block of a fires together with each of b) over all blocks.

    The count is sparse: the work is the number of pairs of firings that share a row. [block, d_b] int64
    """
    by_latent = np.argsort(a.latents, kind="stable")
    rows = a.rows[by_latent]
    ends = np.concatenate([[0], np.cumsum(a.counts)])
    b_lengths = np.diff(b.ends)
    block = max(1, BLOCK_ELEMENTS // max(1, b.n_latents))
    for start in range(0, a.n_latents, block):
        stop = min(start + block, a.n_latents)
        together = np.zeros((stop - start) * b.n_latents, np.int64)
        mine = np.repeat(np.arange(stop - start), np.diff(ends[start : stop + 1])) * b.n_latents
        block_rows = rows[ends[start] : ends[stop]]
        for piece in _pieces(b_lengths[block_rows]):
            lengths = b_lengths[block_rows[piece]]
            theirs = b.latents[_ranges(b.ends[block_rows[piece]], lengths)]
            together += np.bincount(np.repeat(mine[piece], lengths) + theirs, minlength=len(together))
        yield start, together.reshape(stop - start, b.n_latents)


def _pieces(sizes: np.ndarray) -> list[slice]:
    """Slices of consecutive items whose sizes sum to about BLOCK_ELEMENTS at most."""
    total = np.cumsum(sizes)
    cuts = np.searchsorted(total, np.arange(BLOCK_ELEMENTS, int(total[-1]) if len(total) else 0, BLOCK_ELEMENTS))
    edges = sorted({0, *(int(cut) + 1 for cut in cuts if cut + 1 < len(sizes)), len(sizes)})
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one after another."""
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    found: np.ndarray = shift + np.arange(len(shift))
    return found
