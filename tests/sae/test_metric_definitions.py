"""What `make bench-peer-metrics` found, frozen: our measures are their definitions; what other libraries do instead."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.metrics import FiringCounts, ReconstructionSums, ShrinkageSums
from tests.benchmarks import peer_formulas as peers
from tests.benchmarks.peer_formulas import Rows

# Two batches of one dimension, worked by hand.
X = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
X_HAT = torch.tensor([[1.0], [2.0], [10.0], [12.0]])
SIZES = [2, 2]


def _rows(x: Tensor, x_hat: Tensor) -> Rows:
    return Rows(x.double(), torch.zeros(len(x), 1, dtype=torch.float64), x_hat.double())


def _sums(x: Tensor, x_hat: Tensor, sizes: list[int]) -> ReconstructionSums:
    sums = ReconstructionSums()
    for a, b in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        sums.add(a, b)
    return sums


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.sets(st.integers(1, 59), max_size=8), offset=st.sampled_from([0, 30, 1000]))
def test_our_measures_are_the_definitions_in_float64_for_any_batches(seed: int, cuts: set[int], offset: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator) + offset
    x_hat = x + 0.3 * torch.randn(60, 5, generator=generator) + 0.1
    latents = torch.randn(60, 9, generator=generator).sub(1).relu()
    latents[:, 4] = 0
    sizes = [b - a for a, b in itertools.pairwise([0, *sorted(cuts), 60])]
    sums, counts, shrinkage = _sums(x, x_hat, sizes), FiringCounts(9), ShrinkageSums(x.mean(dim=0))
    for a, b, f in zip(x.split(sizes), x_hat.split(sizes), latents.split(sizes), strict=True):
        shrinkage.add(a, b)
        counts.add(f)
    rows = Rows(x.double(), latents.double(), x_hat.double())
    assert sums.fvu == pytest.approx(peers.fvu(rows), rel=1e-9)
    assert sums.squared_error / sums.n_rows == pytest.approx(peers.squared_error(rows), rel=1e-9)
    assert counts.l0 == pytest.approx(peers.l0(rows), rel=1e-12)
    assert counts.dead_fraction == peers.dead_fraction(rows)
    assert counts.frequency.tolist() == pytest.approx(peers.frequency(rows).tolist(), rel=1e-12)
    # Sums of squares of float32 rows: to their rounding.
    assert shrinkage.gamma == pytest.approx(peers.relative_bias(rows), rel=1e-6)
    assert shrinkage.norm_ratio == pytest.approx(peers.norm_ratio(rows), rel=1e-6)
    assert shrinkage.mean_cosine == pytest.approx(peers.cosine(rows), rel=1e-6)


def test_the_micro_fvu_worked_by_hand() -> None:
    # Errors 1, 0, 0, 4; deviations from 6.5: 42.25, 20.25, 12.25, 56.25.
    assert _sums(X, X_HAT, SIZES).fvu == pytest.approx(5 / 131)


def test_mean_of_batches_is_the_formula_of_sparsify() -> None:
    # Batch 1: error 1, deviation 1 + 1. Batch 2: error 4, deviation 4 + 4.
    expected = (1 / 2 + 4 / 8) / 2
    assert _sums(X, X_HAT, SIZES).fvu_mean_of_batches == pytest.approx(expected)
    assert peers.mean_of_batches(peers.fvu, _rows(X, X_HAT), SIZES) == pytest.approx(expected)


def test_centred_per_batch_is_the_formula_of_dictionary_learning() -> None:
    # Errors -1, 0 about -.5 and 0, 2 about 1: squares .5 and 2.
    expected = (0.5 / 2 + 2 / 8) / 2
    assert _sums(X, X_HAT, SIZES).fvu_centred_per_batch == pytest.approx(expected)
    assert peers.mean_of_batches(peers.centred_fvu, _rows(X, X_HAT), SIZES) == pytest.approx(expected)


def test_saelens_legacy_averages_ratios_of_tokens() -> None:
    # Ratios 1/1, 0/1, 0/4, 4/4.
    assert peers.mean_of_token_ratios(_rows(X, X_HAT), SIZES) == pytest.approx(2 / 4)
    # A token that lies at the mean of its batch decides the whole: the micro FVU hardly sees it.
    x = torch.tensor([[-1.0], [1.0], [0.001]])
    near = _rows(x, x + 0.1)
    assert peers.mean_of_token_ratios(near, [3]) > 100 * peers.fvu(near)


def test_saebench_explained_variance_depends_on_the_unit_of_the_activations() -> None:
    # E||x||^2 = 2 and 148, so 75; m = 75; E||e||^2 = (.5 + 2) / 2.
    assert peers.squared_mean_of_squares_fvu(_rows(X, X_HAT), SIZES) == pytest.approx(1.25 / (75 - 75**2))
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    scored = [peers.squared_mean_of_squares_fvu(_rows(s * x, s * 0.9 * x), [50]) for s in (0.1, 1.0, 10.0)]
    assert scored[0] > 0 > scored[2]
    assert scored[0] != pytest.approx(scored[1], rel=0.1)
    ours = [_sums(s * x, s * 0.9 * x, [50]).fvu for s in (0.1, 1.0, 10.0)]
    assert ours == pytest.approx([ours[0]] * 3, rel=1e-5)


def test_saebench_mse_is_divided_by_the_rows_twice() -> None:
    rows = _rows(X, X_HAT)
    assert peers.error_over_batch_rows(rows, [4]) == pytest.approx(peers.squared_error(rows) / 4)
    assert peers.error_over_batch_rows(rows, SIZES) == pytest.approx(peers.squared_error(rows) / 2)


def test_a_variance_from_float32_sums_loses_digits_where_the_mean_is_large() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3000
    x_hat = x + 0.5
    exact = peers.fvu(_rows(x, x_hat))
    assert _sums(x, x_hat, [100] * 5).fvu == pytest.approx(exact, rel=1e-9)
    assert peers.float32_variance_fvu(x, x_hat, [100] * 5) != pytest.approx(exact, rel=1e-3)


def test_a_constant_error_of_the_bias_changes_the_micro_fvu_and_leaves_the_centred_variant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=generator) + 20
    x_hat = x + 0.2 * torch.randn(90, 6, generator=generator)
    sizes = [40, 40, 10]
    right, wrong = _sums(x, x_hat, sizes), _sums(x, x_hat + 1, sizes)
    assert wrong.fvu_centred_per_batch == pytest.approx(right.fvu_centred_per_batch, rel=1e-4)
    # The variance of x is about 1 in every dimension, and so is the square of the error.
    assert wrong.fvu - right.fvu == pytest.approx(1, abs=0.15)


def test_batches_change_the_legacy_variants_and_not_the_micro_measures() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 5
    by_batching = [_sums(x, 0.8 * x + 1, sizes) for sizes in ([64], [16] * 4, [4] * 16)]
    assert len({round(sums.fvu, 9) for sums in by_batching}) == 1
    assert len({round(sums.fvu_mean_of_batches, 3) for sums in by_batching}) == 3
