"""One definition of each measure. Sums are kept in float64 and merge, so any split of the rows gives one answer."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures.base import SparseLatents

BLOCK_ELEMENTS = 1 << 24
"""Cosines in memory at once (64 MiB of float32)."""


@dataclass
class ReconstructionSums:
    """What the fraction of variance unexplained is made of, over any number of batches.

    `fvu` is the one to quote. The legacy variants are kept for comparison with published numbers; they depend on
    the batch size.
    """

    n_rows: int = 0
    squared_error: float = 0.0
    """Sum over rows of ||x - x_hat||^2."""
    squared_deviation: float = 0.0
    """Sum over rows of ||x - mean||^2, the mean taken over all rows seen."""
    mean: Tensor | None = None
    """float64 [d_in]"""
    n_batches: int = 0
    _batch_ratios: float = 0.0
    _batch_centred_ratios: float = 0.0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Count a batch. x, x_hat: [rows, d_in]"""
        if len(x) == 0:
            return
        x = x.detach().to("cpu", torch.float64)
        error = x - x_hat.detach().to("cpu", torch.float64)
        mean = x.mean(dim=0)
        squared_error = float(error.square().sum())
        squared_deviation = float((x - mean).square().sum())
        if squared_deviation > 0:
            centred_error = float((error - error.mean(dim=0)).square().sum())
            ratios = (squared_error / squared_deviation, centred_error / squared_deviation)
        else:
            ratios = (math.nan, math.nan)
        self.merge(ReconstructionSums(len(x), squared_error, squared_deviation, mean, 1, *ratios))

    def merge(self, other: "ReconstructionSums") -> None:
        """Add what another pass over other rows found (Chan et al. 1983 for the deviation)."""
        if other.mean is None:
            return
        if self.mean is None:
            self.mean = other.mean.clone()
        else:
            n_rows = self.n_rows + other.n_rows
            shift = other.mean - self.mean
            self.squared_deviation += float(shift.square().sum()) * self.n_rows * other.n_rows / n_rows
            self.mean = self.mean + shift * (other.n_rows / n_rows)
        self.n_rows += other.n_rows
        self.squared_error += other.squared_error
        self.squared_deviation += other.squared_deviation
        self.n_batches += other.n_batches
        self._batch_ratios += other._batch_ratios
        self._batch_centred_ratios += other._batch_centred_ratios

    @property
    def fvu(self) -> float:
        """Micro FVU: sum ||x - x_hat||^2 / sum ||x - mean||^2 over all rows. Predicting the mean scores 1."""
        return self.squared_error / self.squared_deviation if self.squared_deviation > 0 else math.nan

    @property
    def fvu_mean_of_batches(self) -> float:
        """Legacy: the micro FVU of each batch about its own mean, averaged (sparsify)."""
        return self._batch_ratios / self.n_batches if self.n_batches else math.nan

    @property
    def fvu_centred_per_batch(self) -> float:
        """Legacy: var(x - x_hat) / var(x), both about the batch's mean, averaged (dictionary_learning).

        A constant error of the bias is invisible to it.
        """
        return self._batch_centred_ratios / self.n_batches if self.n_batches else math.nan


@dataclass
class ShrinkageSums:
    """How much too small or too large reconstructions are, over any number of batches.

    The measure is the relative reconstruction bias of Rajamanoharan et al. 2024 (arXiv:2404.16014):
    gamma = argmin over g of E ||x_hat / g - x||^2 = E ||x_hat||^2 / E [x . x_hat]. One is unbiased; x_hat = 0.8 x
    scores 0.8.
    """

    mean: Tensor
    """What the centred variant measures x and x_hat from. [d_in]"""
    n_rows: int = 0
    _x_hat_sq: float = 0.0
    _product: float = 0.0
    _centred_x_hat_sq: float = 0.0
    _centred_product: float = 0.0
    _norm: float = 0.0
    _norm_hat: float = 0.0
    _cosine: float = 0.0
    _n_cosines: int = 0

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Count a batch. x, x_hat: [rows, d_in] float32"""
        mean = self.mean.to(x.dtype)
        norm, norm_hat, product = x.norm(dim=1).double(), x_hat.norm(dim=1).double(), (x * x_hat).sum(dim=1).double()
        centred_hat = x_hat - mean
        self.n_rows += len(x)
        self._x_hat_sq += float(norm_hat.square().sum())
        self._product += float(product.sum())
        self._centred_x_hat_sq += float(centred_hat.square().sum(dim=1).double().sum())
        self._centred_product += float(((x - mean) * centred_hat).sum(dim=1).double().sum())
        self._norm += float(norm.sum())
        self._norm_hat += float(norm_hat.sum())
        defined = (norm > 0) & (norm_hat > 0)
        self._cosine += float((product[defined] / (norm[defined] * norm_hat[defined])).sum())
        self._n_cosines += int(defined.sum())

    @property
    def gamma(self) -> float:
        """E ||x_hat||^2 / E [x . x_hat]."""
        return _ratio(self._x_hat_sq, self._product)

    @property
    def gamma_centred(self) -> float:
        """The same of x - mean and x_hat - mean: a large mean, which a bias reproduces, hides shrinkage."""
        return _ratio(self._centred_x_hat_sq, self._centred_product)

    @property
    def norm_ratio(self) -> float:
        """E ||x_hat|| / E ||x||."""
        return _ratio(self._norm_hat, self._norm)

    @property
    def mean_cosine(self) -> float:
        """Mean cosine of x and x_hat over the rows where both have a direction."""
        return _ratio(self._cosine, self._n_cosines)


@dataclass
class FiringCounts:
    """How often each latent fired (was positive) over any number of batches."""

    d_sae: int
    n_rows: int = 0
    n_fired: Tensor = field(init=False)
    """int64 [d_sae]"""

    def __post_init__(self) -> None:
        self.n_fired = torch.zeros(self.d_sae, dtype=torch.int64)

    def add(self, latents: Tensor) -> None:
        """Count a batch of latents [rows, d_sae]."""
        self.n_rows += len(latents)
        self.n_fired += (latents > 0).sum(dim=0).cpu()

    def add_sparse(self, sparse: SparseLatents, n_rows: int) -> None:
        """Count a batch of `n_rows` rows given by its positive latents."""
        self.n_rows += n_rows
        self.n_fired += torch.bincount(sparse.latent.cpu(), minlength=self.d_sae)

    def merge(self, other: "FiringCounts") -> None:
        """Add what another pass over other rows found."""
        self.n_rows += other.n_rows
        self.n_fired += other.n_fired

    @property
    def l0(self) -> float:
        """Mean number of positive latents per row. It belongs to the architecture's inference rule."""
        return int(self.n_fired.sum()) / self.n_rows if self.n_rows else math.nan

    @property
    def frequency(self) -> Tensor:
        """Share of the rows in which each latent fired. float64 [d_sae]"""
        return self.n_fired.double() / max(self.n_rows, 1)

    @property
    def n_dead(self) -> int:
        """Latents that never fired on the rows counted."""
        return int((self.n_fired == 0).sum())

    @property
    def dead_fraction(self) -> float:
        """Share of the latents that never fired on the rows counted."""
        return self.n_dead / self.d_sae


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the loss an ablation causes that the SAE's reconstruction recovers. Name the ablation beside it.

    Args:
        clean: cross-entropy of the untouched model, nats per token.
        spliced: with the reconstruction in place of the activation.
        ablated: with zero, or the mean, in its place.

    Returns: (ablated - spliced) / (ablated - clean); NaN when the ablation costs nothing.
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else math.nan


def max_cosines(rows: Tensor, dictionary: Tensor, own: Tensor | None = None) -> Tensor:
    """The largest cosine of every row to a row of a dictionary, block by block. [n] float32

    Args:
        rows: [n, d_in]
        dictionary: [m, d_in]
        own: where each of `rows` stands in the dictionary itself: that entry does not count. int64 [n]

    Returns: on the CPU; NaN where nothing was left to compare with.
    """
    rows, dictionary = F.normalize(rows.float(), dim=1), F.normalize(dictionary.float(), dim=1)
    best = torch.full((len(rows),), math.nan)
    block = max(1, BLOCK_ELEMENTS // max(len(dictionary), 1))
    if len(dictionary) <= (own is not None):
        return best
    for start in range(0, len(rows), block):
        cosines = rows[start : start + block] @ dictionary.T
        if own is not None:
            cosines.scatter_(1, own[start : start + block, None], -math.inf)
        best[start : start + block] = cosines.amax(dim=1).cpu()
    return best


def mean_max_cosine(W_a: Tensor, W_b: Tensor) -> tuple[float, float]:
    """MMCS of two dictionaries in both directions: how much of each the other holds.

    High values mean little in few dimensions or for large dictionaries: show a random dictionary's beside them.

    Args:
        W_a, W_b: decoder rows of any norm. [n, d_in], [m, d_in]

    Returns: mean over the rows of `W_a` of the largest cosine to a row of `W_b`; the same from b to a.
    Source: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders".
    """
    return float(max_cosines(W_a, W_b).double().mean()), float(max_cosines(W_b, W_a).double().mean())


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
