"""Bootstrap intervals over contexts: rows of one context are not independent, so contexts are what is redrawn."""

import numpy as np

from sae.philox import philox

BLOCK_ELEMENTS = 1 << 22
"""Indices drawn at once."""
Interval = list[float] | None
"""[2.5 %, 97.5 %]; None where there is none."""


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, n_draws: int, *key: str | int) -> Interval:
    """95 % percentile interval of sum(numerator) / sum(denominator) when the contexts are drawn again.

    Args:
        numerator, denominator: one value per context; both are redrawn together. [n]
        n_draws: bootstrap draws; 0 gives None, as do fewer than two contexts.
        key: of the random numbers.
    """
    return ratio_intervals(numerator[:, None], denominator[:, None], n_draws, *key)[0]


def ratio_intervals(numerators: np.ndarray, denominators: np.ndarray, n_draws: int, *key: str | int) -> list[Interval]:
    """An interval for each of several ratios, all from the same draws. numerators, denominators: [n, n_ratios]"""
    n, n_ratios = numerators.shape
    if n_draws == 0 or n < 2:
        return [None] * n_ratios
    generator = philox("bootstrap", *key)
    ratios = np.empty((n_draws, n_ratios))
    block = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, n_draws, block):
        stop = min(start + block, n_draws)
        drawn = generator.integers(0, n, (stop - start, n)) + n * np.arange(stop - start)[:, None]
        n_times = np.bincount(drawn.reshape(-1), minlength=(stop - start) * n).reshape(-1, n).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[start:stop] = _summed(n_times, numerators) / _summed(n_times, denominators)
    return [_percentiles(column) for column in ratios.T]


def _summed(n_times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """n_times @ values by numpy's own loops: a BLAS rounds otherwise with another kernel."""
    return np.einsum("dn,nr->dr", n_times, values)


def _percentiles(ratios: np.ndarray) -> Interval:
    finite = ratios[np.isfinite(ratios)]
    return [float(edge) for edge in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
