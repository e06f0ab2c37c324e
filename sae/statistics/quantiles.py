"""Quantiles of each latent's activations, from the exact histogram or from all firings where those are kept."""

import numpy as np

from sae.statistics.accumulate import BINS_PER_OCTAVE, HISTOGRAM_EDGES
from sae.statistics.firings import Firings

MIN_FIRINGS = 5
"""Latents that fired less often get no quantiles and no quantile groups."""
SHARES = (0.25, 0.5, 0.75)
BOUND = 2 ** (1 / BINS_PER_OCTAVE) - 1
"""Largest relative error, 9.1 %: the width of a bin of the histogram over its lower edge."""


def quartile_edges(histogram: np.ndarray, maximum: np.ndarray, sample: Firings) -> np.ndarray:
    """25, 50 and 75 % quantiles of each latent's activations. [d_sae, 3] float32

    Exact (numpy's interpolated quantiles) where the sample holds all firings. Elsewhere the bin that holds the
    quantile (the firing of rank floor(share (n - 1)), numpy's method "lower") is known exactly and the place in it
    interpolated: off by at most BOUND, for activations inside the histogram's range, 2^-16 to 2^16. NaN for latents
    with fewer than MIN_FIRINGS.

    Args:
        histogram: counts over HISTOGRAM_EDGES. [d_sae, 256]
        maximum: largest activation. [d_sae]
        sample: uniform sample of each latent's firings.
    """
    n_fired = histogram.sum(axis=1)
    edges = _from_histogram(histogram, maximum, n_fired)
    edges[n_fired < MIN_FIRINGS] = np.nan
    value = sample.value[np.lexsort((sample.value, sample.latent))].astype(np.float64)
    latents, starts, sizes = np.unique(sample.latent, return_index=True, return_counts=True)
    whole = (sizes == n_fired[latents]) & (sizes >= MIN_FIRINGS)
    latents, starts, sizes = latents[whole], starts[whole], sizes[whole]
    for column, share in enumerate(SHARES):
        place = share * (sizes - 1)
        below = np.floor(place).astype(np.int64)
        low, high = value[starts + below], value[starts + np.minimum(below + 1, sizes - 1)]
        edges[latents, column] = low + (high - low) * (place - below)
    return edges.astype(np.float32)


def _from_histogram(histogram: np.ndarray, maximum: np.ndarray, n_fired: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(histogram, axis=1)
    latents = np.arange(len(histogram))
    edges = np.full((len(histogram), len(SHARES)), np.nan)
    for column, share in enumerate(SHARES):
        rank = np.floor(share * np.maximum(n_fired - 1, 0))
        bins = np.minimum((cumulative <= rank[:, None]).sum(axis=1), histogram.shape[1] - 1)
        inside = histogram[latents, bins]
        before = cumulative[latents, bins] - inside
        low, high = HISTOGRAM_EDGES[bins], np.minimum(HISTOGRAM_EDGES[bins + 1], maximum)
        edges[:, column] = low + np.maximum(high - low, 0) * (rank - before + 0.5) / np.maximum(inside, 1)
    return edges
