"""Everything that is accumulated about the latents of one SAE, such that merge(stats(A), stats(B)) == stats(A + B).

Counts, maxima, histograms, examples and sampled rows merge exactly, in any order and any tree. Sums of activations are
float64 and agree to rounding, so parts are always merged in order of their number. Memory: d_sae x (bins + kept
examples) and the tables of `Cooccurrence`, whatever the number of rows.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from sae.extract.config import Split
from sae.statistics.cooccurrence import Cooccurrence
from sae.statistics.firings import NO_LABEL, SPLITS, Block, Firings, Rows
from sae.statistics.kept import Kept, derived_numbers, row_numbers, strengths
from sae.statistics.row_sample import RowSample, SampledRows

BINS_PER_OCTAVE = 8
MIN_EXPONENT, MAX_EXPONENT = -16, 16
HISTOGRAM_EDGES = 2.0 ** (
    np.arange((MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE + MIN_EXPONENT
)
"""Edges of the activation histogram, the same for all latents; what lies outside counts in the end bins. [257]"""
N_BINS = len(HISTOGRAM_EDGES) - 1
PLACES_PER_TOKEN = 16
"""Random rows kept for every token, among which its latents' near misses are looked for."""
_PLACE_SALT = 0x504C4143

# The leading bits of a float, exponent and six of the mantissa, name a cell so narrow that at most one edge lies in it.
_CELL_BITS = 6
_SHIFT = 23 - _CELL_BITS
_FIRST_CELL = (127 + MIN_EXPONENT) << _CELL_BITS
_CELLS = np.arange((MAX_EXPONENT - MIN_EXPONENT) << _CELL_BITS, dtype=np.uint32)
_BIN_OF_CELL = np.searchsorted(
    HISTOGRAM_EDGES, ((_CELLS + np.uint32(_FIRST_CELL)) << np.uint32(_SHIFT)).view(np.float32), side="right"
) - 1  # fmt: skip
"""The bin in which each cell begins."""


class Sizes(NamedTuple):
    """What decides how much is kept."""

    d_sae: int
    n_top: int
    """Strongest firings kept per latent, one per document."""
    n_samples: int
    """Size of the uniform sample of each latent's firings."""
    seed: int
    """Of the samples."""
    row_share: float = 0.0
    """Share of the rows that are kept with all their latents."""
    vocab_size: int = 0
    """0 without text."""
    n_labels: int = 0
    """Syntax labels; 0 where the corpus has none."""
    context_tokens: int = 0
    """Length of the contexts; 0 without text."""


class LatentSums:
    """The accumulator of one SAE."""

    def __init__(self, sizes: Sizes) -> None:
        d_sae = sizes.d_sae
        self.sizes, self.d_sae = sizes, d_sae
        self.n_rows = np.zeros(len(SPLITS), np.int64)
        self.n_fired = np.zeros((len(SPLITS), d_sae), np.int64)
        self.sum = np.zeros(d_sae, np.float64)
        self.sum_sq = np.zeros(d_sae, np.float64)
        self.max = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.top = Kept(d_sae, sizes.n_top, per_document=True)
        self.sample = Kept(d_sae, sizes.n_samples, per_document=False)
        self.rows = RowSample(sizes.row_share)
        self.places = Kept(sizes.vocab_size, PLACES_PER_TOKEN, per_document=False)
        """Random rows of every token, in the form of firings whose latent is the token."""
        self.position_edges = position_edges(sizes.context_tokens)
        self.on = {
            "token": Cooccurrence(d_sae, sizes.vocab_size),
            "previous token": Cooccurrence(d_sae, sizes.vocab_size),
            "syntax": Cooccurrence(d_sae, sizes.n_labels),
            "position": Cooccurrence(d_sae, len(self.position_edges) - 1),
        }
        """Firings by what stands at the row."""

    def add(self, split: Split, block: Block) -> None:
        """Count the rows of a block and all their firings."""
        code = SPLITS.index(split)
        rows, row, value = block.rows, block.row, block.value
        latent = block.latent.astype(np.intp)
        wide = value.astype(np.float64)
        self.n_rows[code] += len(rows)
        self.n_fired[code] += np.bincount(latent, minlength=self.d_sae)
        self.sum += np.bincount(latent, wide, self.d_sae)
        self.sum_sq += np.bincount(latent, wide * wide, self.d_sae)
        np.maximum.at(self.max, latent, value)
        np.add.at(self.histogram.reshape(-1), latent * N_BINS + bins_of(value), 1)
        numbers = row_numbers(self.sizes.seed, rows)
        self.top.add(block, strengths(value))
        self.sample.add(block, derived_numbers(numbers[row], block.latent))
        self.rows.add(block, numbers)
        if self.sizes.vocab_size:
            self._add_text(rows, row, latent, numbers)

    def _add_text(self, rows: Rows, row: np.ndarray, latent: np.ndarray, numbers: np.ndarray) -> None:
        at_token = Block(rows, np.arange(len(rows)), rows.token, np.zeros(len(rows), np.float32))
        self.places.add(at_token, derived_numbers(numbers, _PLACE_SALT))
        labels = np.where(rows.label == NO_LABEL, -1, rows.label.astype(np.int64))
        positions = np.searchsorted(self.position_edges, rows.pos, side="right") - 1
        for name, codes in (
            ("token", rows.token),
            ("previous token", rows.previous),
            ("syntax", labels),
            ("position", positions),
        ):
            self.on[name].add(codes, row, latent)

    def merge(self, other: "LatentSums") -> None:
        """Add what another accumulator saw; the two must have seen different rows."""
        self.n_rows += other.n_rows
        self.n_fired += other.n_fired
        self.sum += other.sum
        self.sum_sq += other.sum_sq
        np.maximum(self.max, other.max, out=self.max)
        self.histogram += other.histogram
        for mine, theirs in zip(self._kept().values(), other._kept().values(), strict=True):
            mine.merge(*theirs.read())
        self.rows.merge(other.rows.read())
        for name, counts in self.on.items():
            counts.merge(other.on[name])

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file; the same content gives the same bytes."""
        used = np.flatnonzero(self.histogram)
        tensors = {name: getattr(self, name) for name in _PLAIN}
        tensors |= {"histogram.index": used, "histogram.count": self.histogram.reshape(-1)[used]}
        for name, kept in self._kept().items():
            firings, score = kept.read()
            tensors |= {f"{name}.{field}": column for field, column in firings._asdict().items()}
            tensors[f"{name}.score"] = score
        sampled = self.rows.read()
        tensors |= {f"rows.{field}": column for field, column in sampled.rows._asdict().items()}
        tensors |= {f"rows.{field}": getattr(sampled, field) for field in _SAMPLED}
        for name, counts in self.on.items():
            tensors |= {f"{name}.{field}": column for field, column in counts.tensors().items()}
        save_file(tensors, path)

    def merge_file(self, path: Path) -> None:
        """Add a saved accumulator of the same sizes."""
        tensors = load_file(path)
        self.n_rows += tensors["n_rows"]
        self.n_fired += tensors["n_fired"]
        self.sum += tensors["sum"]
        self.sum_sq += tensors["sum_sq"]
        np.maximum(self.max, tensors["max"], out=self.max)
        self.histogram.reshape(-1)[tensors["histogram.index"]] += tensors["histogram.count"]
        for name, kept in self._kept().items():
            kept.merge(Firings(*(tensors[f"{name}.{field}"] for field in Firings._fields)), tensors[f"{name}.score"])
        rows = Rows(*(tensors[f"rows.{field}"] for field in Rows._fields))
        self.rows.merge(SampledRows(rows, *(tensors[f"rows.{field}"] for field in _SAMPLED)))
        for name, counts in self.on.items():
            counts.add_tensors({field: tensors[f"{name}.{field}"] for field in ("rows", "index", "count")})

    def _kept(self) -> dict[str, Kept]:
        return {"top": self.top, "sample": self.sample, "places": self.places}


_PLAIN = ("n_rows", "n_fired", "sum", "sum_sq", "max")
_SAMPLED = ("offsets", "latent", "value")


def bins_of(value: np.ndarray) -> np.ndarray:
    """The bin of HISTOGRAM_EDGES that each activation (float32, above zero) lies in. [n] int64"""
    cell = (value.view(np.uint32) >> np.uint32(_SHIFT)).astype(np.int64) - _FIRST_CELL
    bins = _BIN_OF_CELL[np.clip(cell, 0, len(_BIN_OF_CELL) - 1)]
    return np.minimum(bins + (value >= HISTOGRAM_EDGES[bins + 1]), N_BINS - 1)


def position_edges(context_tokens: int) -> np.ndarray:
    """Edges of the bins of positions: 0, 1, 2, 4, 8, ... up to the context's length."""
    if context_tokens == 0:
        return np.zeros(1, np.int64)
    powers = 1 << np.arange(max(context_tokens - 1, 1).bit_length())
    return np.concatenate([[0], powers[powers < context_tokens], [context_tokens]])
