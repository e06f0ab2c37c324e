"""How often each latent fires where something stands (a token, a label): exact counts, and what they say about it."""

from typing import NamedTuple

import numpy as np

from sae.statistics.kept import rank_in_run

MAX_PAIRS = 1 << 25
"""Pairs of latent and code that are counted (256 MiB); beyond, `Cooccurrence` counts the rows of each code alone."""
FEW_CODES = 64
"""So few codes are counted whatever the number of latents: less than the histogram's memory."""
BLOCK_PAIRS = 1 << 22
"""Pairs looked at together."""


class Pairs(NamedTuple):
    """Codes that stand where a latent fires. Parallel arrays [n], sorted by latent, then most firings first."""

    latent: np.ndarray
    """int64"""
    code: np.ndarray
    """int64"""
    n_firings: np.ndarray
    """Firings looked at on which the code stands. int64"""

    def __len__(self) -> int:
        return len(self.latent)


class Association(NamedTuple):
    """Pairs and how strong they are. Parallel arrays [n]."""

    pairs: Pairs
    precision: np.ndarray
    """Share of the latent's firings on which the code stands. float64"""
    recall: np.ndarray
    """Share of the code's rows on which the latent fires. float64"""
    lift: np.ndarray
    """Precision over the code's share of all rows. float64"""

    def take(self, index: np.ndarray) -> "Association":
        """The pairs at `index` (indices or a mask)."""
        pairs = Pairs(*(column[index] for column in self.pairs))
        return Association(pairs, self.precision[index], self.recall[index], self.lift[index])


class Cooccurrence:
    """Counts of (latent, code) over rows that carry one code each; sums, so they merge exactly in any order.

    Args:
        n_codes: codes are 0 to n_codes - 1; rows with another carry none.
    """

    def __init__(self, d_sae: int, n_codes: int) -> None:
        self.d_sae, self.n_codes = d_sae, n_codes
        self.rows = np.zeros(n_codes, np.int64)
        """Rows that carry each code. [n_codes]"""
        self.exact = n_codes <= FEW_CODES or d_sae * n_codes <= MAX_PAIRS
        self.counts = np.zeros((d_sae, n_codes) if self.exact else (0, 0), np.int64)
        """Firings of each latent on each code. [d_sae, n_codes], empty when there are too many pairs."""

    def add(self, codes: np.ndarray, row: np.ndarray, latent: np.ndarray) -> None:
        """Count rows and their firings.

        Args:
            codes: of every row. [n_rows]
            row: index into `codes` of every firing. [n]
            latent: [n]
        """
        if self.n_codes == 0:
            return
        carried = (codes >= 0) & (codes < self.n_codes)
        self.rows += np.bincount(codes[carried], minlength=self.n_codes)
        if not self.exact:
            return
        flat = latent.astype(np.int64) * self.n_codes + codes[row]
        np.add.at(self.counts.reshape(-1), flat if carried.all() else flat[carried[row]], 1)

    def merge(self, other: "Cooccurrence") -> None:
        """Add what was counted over other rows."""
        self.rows += other.rows
        self.counts += other.counts

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything, for a file: only pairs that occurred."""
        flat = self.counts.reshape(-1)
        used = np.flatnonzero(flat)
        return {"rows": self.rows, "index": used, "count": flat[used]}

    def add_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        """Add what `tensors` of another gave."""
        self.rows += tensors["rows"]
        self.counts.reshape(-1)[tensors["index"]] += tensors["count"]

    def top(self, n: int) -> Pairs:
        """The n codes of every latent with most firings. Only where counts are exact."""
        pieces = []
        block = max(1, BLOCK_PAIRS // max(self.n_codes, 1))
        for start in range(0, self.d_sae if self.n_codes else 0, block):
            counts = self.counts[start : start + block]
            latent, code = np.nonzero(counts)
            pieces.append(top_pairs(latent + start, code, counts[latent, code], n))
        return Pairs(*(np.concatenate(columns) for columns in zip(*pieces, strict=True))) if pieces else no_pairs()

    def associate(self, pairs: Pairs, n_looked_at: np.ndarray, n_fired: np.ndarray, n_rows: int) -> Association:
        """Precision, recall and lift of pairs.

        Args:
            pairs: counted over all firings, or over a sample of each latent's.
            n_looked_at: how many firings of each latent they were counted over. [d_sae]
            n_fired: how many there are. [d_sae]
            n_rows: rows seen in all.
        """
        latent, code, count = pairs
        precision = count / np.maximum(n_looked_at[latent], 1)
        of_code = np.maximum(self.rows[code], 1)
        # count / rows where all firings were looked at, else an estimate that may exceed 1.
        recall = np.minimum(count * (n_fired[latent] / np.maximum(n_looked_at[latent], 1)) / of_code, 1)
        return Association(pairs, precision, recall, precision * max(n_rows, 1) / of_code)


def top_pairs(latent: np.ndarray, code: np.ndarray, count: np.ndarray, n: int) -> Pairs:
    """The n codes with the largest counts of every latent; of equal ones the lowest codes. Pairs are distinct."""
    order = np.lexsort((code, -count, latent))
    kept = order[rank_in_run(latent[order]) < n]
    return Pairs(*(column[kept].astype(np.int64) for column in (latent, code, count)))


def count_pairs(latent: np.ndarray, code: np.ndarray, n_codes: int, n: int) -> Pairs:
    """The n most frequent codes of every latent among some firings. latent, code: [firings]; negative codes: none."""
    has = code >= 0
    key, count = np.unique(latent[has].astype(np.int64) * n_codes + code[has], return_counts=True)
    return top_pairs(key // n_codes, key % n_codes, count, n) if len(key) else no_pairs()


def no_pairs() -> Pairs:
    """No pairs."""
    return Pairs(*(np.empty(0, np.int64) for _ in Pairs._fields))
