"""Quantiles: exact where all firings are known, within the stated bound elsewhere."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae.statistics.accumulate import N_BINS, bins_of
from sae.statistics.firings import Firings
from sae.statistics.quantiles import BOUND, SHARES, quartile_edges


def edges_of(values: np.ndarray, n_sampled: int) -> np.ndarray:
    """The edges of one latent with these activations, of which the first `n_sampled` are in the sample."""
    value = values.astype(np.float32)
    histogram = np.bincount(bins_of(value), minlength=N_BINS)[None]
    sampled = value[:n_sampled]
    nothing = np.zeros(n_sampled, np.int64)
    sample = Firings(nothing.astype(np.int32), sampled, nothing, nothing.astype(np.int32), nothing)
    return quartile_edges(histogram, value.max(initial=0, keepdims=True), sample)[0]


@given(st.lists(st.floats(2**-10, 2**10, width=32), min_size=5, max_size=64))
def test_quantiles_of_all_firings_equal_numpys(values: list[float]) -> None:
    found = edges_of(np.array(values), len(values))
    np.testing.assert_allclose(found, np.quantile(np.array(values), SHARES), rtol=1e-5)


@given(st.lists(st.floats(2**-16, 2**15, width=32), min_size=65, max_size=300))
def test_quantiles_from_the_histogram_keep_the_bound(values: list[float]) -> None:
    found = edges_of(np.array(values), 64)
    exact = np.quantile(np.array(values), SHARES, method="lower")
    assert (np.abs(found / exact - 1) <= BOUND + 1e-6).all()
    assert (np.diff(found) >= 0).all()


def test_rare_latents_have_no_quantiles() -> None:
    assert np.isnan(edges_of(np.array([1.0, 2.0, 3.0, 4.0]), 4)).all()
    assert np.isnan(edges_of(np.empty(0), 0)).all()
