import math

import pytest
import torch

from sae import metrics
from sae.architectures import SparseLatents
from sae.metrics import (
    FiringCounts,
    ReconstructionSums,
    ShrinkageSums,
    ce_recovered,
    max_cosines,
    mean_max_cosine,
)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=generator) * torch.arange(1, 8) + 100
    return x, x + torch.randn(300, 7, generator=generator) + 0.5


def test_predicting_the_mean_scores_an_fvu_of_one() -> None:
    x, _ = _data()
    sums = ReconstructionSums()
    for block in x.split(64):
        sums.add(block, x.mean(dim=0).expand_as(block))
    assert sums.fvu == pytest.approx(1, abs=1e-6)


def test_a_perfect_reconstruction_scores_zero() -> None:
    x, _ = _data()
    sums = ReconstructionSums()
    sums.add(x, x)
    assert (sums.fvu, sums.fvu_mean_of_batches, sums.fvu_centred_per_batch) == (0, 0, 0)


def test_any_split_of_the_rows_and_any_merge_gives_the_fvu_of_the_whole() -> None:
    x, x_hat = _data()
    expected = float((x - x_hat).double().square().sum() / (x - x.double().mean(dim=0)).square().sum())
    for sizes in ([300], [1] * 300, [7, 93, 200]):
        halves = [ReconstructionSums(), ReconstructionSums()]
        for i, (a, b) in enumerate(zip(x.split(sizes), x_hat.split(sizes), strict=True)):
            halves[i % 2].add(a, b)
        halves[0].merge(halves[1])
        assert halves[0].fvu == pytest.approx(expected, rel=1e-9)
        assert halves[0].n_rows == 300
        assert torch.allclose(halves[0].mean, x.double().mean(dim=0))


def test_legacy_variants_follow_their_definitions() -> None:
    x, x_hat = _data()
    sums = ReconstructionSums()
    ratios, centred = [], []
    for a, b in zip(x.split(100), x_hat.split(100), strict=True):
        sums.add(a, b)
        a, e = a.double(), (a - b).double()
        deviation = (a - a.mean(0)).square().sum()
        ratios.append(float(e.square().sum() / deviation))
        centred.append(float(e.var(0).sum() / a.var(0).sum()))
    assert sums.fvu_mean_of_batches == pytest.approx(sum(ratios) / 3, rel=1e-6)
    assert sums.fvu_centred_per_batch == pytest.approx(sum(centred) / 3, rel=1e-6)


def test_a_constant_error_is_invisible_only_to_the_centred_variant() -> None:
    x, _ = _data()
    sums = ReconstructionSums()
    sums.add(x, x + 3)
    assert sums.fvu_centred_per_batch == pytest.approx(0, abs=1e-9)
    assert sums.fvu > 0.1


def test_no_rows_or_no_variance_has_no_fvu() -> None:
    sums = ReconstructionSums()
    assert math.isnan(sums.fvu)
    sums.add(torch.ones(5, 3), torch.zeros(5, 3))
    assert math.isnan(sums.fvu)


def test_firing_counts_agree_for_dense_and_sparse_latents_and_merge() -> None:
    latents = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    dense, sparse = FiringCounts(4), FiringCounts(4)
    dense.add(latents)
    row, latent = latents.nonzero(as_tuple=True)
    sparse.add_sparse(SparseLatents(row, latent, latents[row, latent]), 3)
    assert dense.n_fired.tolist() == sparse.n_fired.tolist() == [1, 2, 0, 0]
    assert dense.l0 == sparse.l0 == 1
    assert (dense.n_dead, dense.dead_fraction) == (2, 0.5)
    dense.merge(sparse)
    assert dense.n_rows == 6
    assert dense.frequency.tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])


def test_ce_recovered_is_one_for_no_increase_and_zero_for_the_ablation() -> None:
    assert ce_recovered(clean=3.0, spliced=3.0, ablated=10.0) == 1
    assert ce_recovered(clean=3.0, spliced=10.0, ablated=10.0) == 0
    assert ce_recovered(clean=3.0, spliced=3.7, ablated=10.0) == pytest.approx(0.9)
    assert math.isnan(ce_recovered(clean=3.0, spliced=3.0, ablated=3.0))


def shrinkage_of(x: torch.Tensor, x_hat: torch.Tensor, mean: torch.Tensor, block: int = 64) -> ShrinkageSums:
    sums = ShrinkageSums(mean)
    for a, b in zip(x.split(block), x_hat.split(block), strict=True):
        sums.add(a, b)
    return sums


def test_shrinkage_of_a_scaled_copy_is_its_scale() -> None:
    x, _ = _data()
    sums = shrinkage_of(x, 0.8 * x, torch.zeros(7))
    assert (sums.gamma, sums.gamma_centred) == pytest.approx((0.8, 0.8), rel=1e-5)
    assert sums.norm_ratio == pytest.approx(0.8, rel=1e-5)
    assert sums.mean_cosine == pytest.approx(1, rel=1e-5)


def test_only_the_centred_shrinkage_sees_through_a_large_mean() -> None:
    x, _ = _data()
    mean = x.double().mean(dim=0)
    sums = shrinkage_of(x, (mean + 0.5 * (x - mean)).float(), mean)
    assert sums.gamma == pytest.approx(1, abs=0.01)
    assert sums.gamma_centred == pytest.approx(0.5, rel=1e-4)


def test_shrinkage_minimises_the_error_it_is_defined_by() -> None:
    x, x_hat = _data()
    gamma = shrinkage_of(x, x_hat, x.mean(dim=0)).gamma
    errors = [(x_hat.double() / (gamma + step) - x).square().sum() for step in (-1e-3, 0, 1e-3)]
    assert errors[1] < min(errors[0], errors[2])


def test_shrinkage_sums_equal_plain_means_and_leave_rows_without_direction_out_of_the_cosine() -> None:
    x, x_hat = _data()
    x[3] = 0
    x_hat[5] = 0
    sums = shrinkage_of(x, x_hat, x.mean(dim=0), block=7)
    a, b = x.double(), x_hat.double()
    assert sums.norm_ratio == pytest.approx(float(b.norm(dim=1).mean() / a.norm(dim=1).mean()), rel=1e-6)
    cosines = [float(torch.cosine_similarity(a[i], b[i], dim=0)) for i in range(300) if i not in (3, 5)]
    assert sums.mean_cosine == pytest.approx(sum(cosines) / 298, rel=1e-6)
    assert math.isnan(ShrinkageSums(torch.zeros(3)).gamma)


@pytest.mark.parametrize("elements", [1 << 24, 20])
def test_largest_cosines_equal_a_plain_loop(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(n, 4, generator=generator) for n in (9, 6))
    cosine = torch.cosine_similarity(a.double()[:, None], b.double()[None], dim=2)
    torch.testing.assert_close(max_cosines(a, b).double(), cosine.amax(dim=1), atol=1e-6, rtol=0)
    assert mean_max_cosine(a, b) == pytest.approx(
        (float(cosine.amax(1).mean()), float(cosine.amax(0).mean())), abs=1e-6
    )
    own = torch.tensor([4, 0, 8])
    among = torch.cosine_similarity(a.double()[:, None], a.double()[None], dim=2).fill_diagonal_(-2)
    torch.testing.assert_close(max_cosines(a[own], a, own).double(), among[own].amax(dim=1), atol=1e-6, rtol=0)


def test_mmcs_of_a_part_with_the_whole_is_one_in_one_direction() -> None:
    whole = torch.eye(4)
    assert mean_max_cosine(whole[:2], whole) == (1, pytest.approx(0.5))
    assert math.isnan(max_cosines(whole[:1], whole[:1], torch.tensor([0]))[0])
