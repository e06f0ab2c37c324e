"""The n best firings of every latent, by a score that depends on nothing but the firing: so kept lists merge exactly.

Two scores are used. Strength gives the strongest firings. A pseudo-random number gives a uniform sample, as in a
bottom-k sketch (Cohen and Kaplan 2007): the n smallest of a union are among the n smallest of its parts.
"""

import numpy as np

from sae.statistics.firings import Block, Firings, Rows

MAX_PENDING = 1 << 19
"""Firings that wait to be sorted in, per kept list."""
_NO_LIMIT = np.uint64(0xFFFFFFFFFFFFFFFF)


def row_numbers(seed: int, rows: Rows) -> np.ndarray:
    """A pseudo-random number per row that depends on nothing but seed and place. [n_rows] uint64

    Mixing: the finalizer of splitmix64 (Steele et al. 2014), once per word.
    """
    state = _mix(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, np.uint64))
    for word in (rows.context, rows.pos):
        state = _mix(state ^ word.astype(np.uint64))
    return state


def derived_numbers(numbers: np.ndarray, salt: np.ndarray | int) -> np.ndarray:
    """Other pseudo-random numbers from `numbers`, one for each salt. [n] uint64"""
    return _mix(numbers ^ np.asarray(salt).astype(np.uint64))


def strengths(value: np.ndarray) -> np.ndarray:
    """A number per activation (float32, above zero) that is smaller the stronger it is. [n] uint64"""
    # The bits of positive floats are in the floats' order.
    return (np.uint32(0xFFFFFFFF) - value.view(np.uint32)).astype(np.uint64)


class Kept:
    """The n firings of every latent with the smallest score, or the n documents with the smallest scores.

    Args:
        n: how many to keep per latent.
        per_document: keep only the best firing of each document.
    """

    def __init__(self, d_sae: int, n: int, *, per_document: bool) -> None:
        self.n, self.per_document = n, per_document
        self._limit = np.full(d_sae, _NO_LIMIT)
        self._firings, self._score = Firings.empty(), np.empty(0, np.uint64)
        self._pending: list[tuple[Firings, np.ndarray]] = []
        self._n_pending = 0

    def add(self, block: Block, score: np.ndarray) -> None:
        """Offer the firings of a block. `score`: [n] uint64"""
        # A firing above the limit has n better ones already (in n other documents), so it can never be kept.
        good = np.flatnonzero(score <= self._limit[block.latent])
        self._offer(block.firings(good), score[good])

    def merge(self, firings: Firings, score: np.ndarray) -> None:
        """Offer what another list has kept: the result of its `read`."""
        self._offer(firings, score)

    def _offer(self, firings: Firings, score: np.ndarray) -> None:
        self._pending.append((firings, score))
        self._n_pending += len(score)
        if self._n_pending >= MAX_PENDING:
            self._sort_in()

    def read(self) -> tuple[Firings, np.ndarray]:
        """What is kept and its scores, sorted by latent, then score, then place."""
        self._sort_in()
        return self._firings, self._score

    def _sort_in(self) -> None:
        if not self._pending:
            return
        firings = Firings.concatenate([self._firings, *(piece for piece, _ in self._pending)])
        score = np.concatenate([self._score, *(piece for _, piece in self._pending)])
        self._pending, self._n_pending = [], 0
        if self.per_document:
            order = np.lexsort((firings.pos, firings.context, score, firings.doc, firings.latent))
            latent, doc = firings.latent[order], firings.doc[order]
            order = order[_first_of_run(latent) | _first_of_run(doc)]
            firings, score = firings.take(order), score[order]
        order = np.lexsort((firings.pos, firings.context, score, firings.latent))
        rank = rank_in_run(firings.latent[order])
        order = order[rank < self.n]
        self._firings, self._score = firings.take(order), score[order]
        last = rank[rank < self.n] == self.n - 1
        self._limit[self._firings.latent[last]] = self._score[last]


def rank_in_run(sorted_keys: np.ndarray) -> np.ndarray:
    """Place of every element among the equal elements around it. [n] int64"""
    starts = np.flatnonzero(_first_of_run(sorted_keys))
    lengths = np.diff(np.append(starts, len(sorted_keys)))
    return np.arange(len(sorted_keys)) - np.repeat(starts, lengths)


def _first_of_run(sorted_keys: np.ndarray) -> np.ndarray:
    first = np.ones(len(sorted_keys), bool)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    return first


def _mix(state: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
