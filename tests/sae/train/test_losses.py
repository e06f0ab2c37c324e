import pytest
import torch

from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.train.losses import auxk_loss, batch_topk_losses, l1_loss, standard_losses, topk_losses
from sae.train.step import autograd_gradients, fast_gradients

D_IN, D_SAE, ROWS = 7, 24, 40


def _sae(config: SAEConfig) -> SAE:
    sae = build_sae(config, D_IN).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    return sae


def _x(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def test_l1_worked_by_hand() -> None:
    latents = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert float(l1_loss(latents)) == 3.0
    assert float(l1_loss(latents, torch.tensor([2.0, 10.0]))) == 0.5 * 2 + 2.5 * 10


def test_auxk_equals_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(9, 4, generator=generator)
    pre_acts = torch.randn(9, 6, generator=generator)
    W_dec = torch.randn(6, 4, generator=generator)
    error = 0.0
    for row in range(9):
        strongest = sorted(range(6), key=lambda i: -float(pre_acts[row, i]))[:2]
        predicted = sum(max(float(pre_acts[row, i]), 0.0) * W_dec[i] for i in strongest)
        error += float((residual[row] - predicted).square().sum())
    variance = float((residual - residual.mean(0)).square().sum())
    assert float(auxk_loss(residual, pre_acts, W_dec, 2)) == pytest.approx(error / variance, rel=1e-5)


def test_auxk_takes_at_most_the_latents_that_are_dead() -> None:
    residual, pre_acts, W_dec = torch.randn(9, 4), torch.randn(9, 6), torch.randn(6, 4)
    assert torch.equal(auxk_loss(residual, pre_acts, W_dec, 6), auxk_loss(residual, pre_acts, W_dec, 256))


def test_auxk_is_zero_without_dead_latents_and_for_a_residual_without_variance() -> None:
    assert auxk_loss(torch.randn(9, 4), torch.empty(9, 0), torch.empty(0, 4), 5) == 0
    assert auxk_loss(torch.ones(1, 4), torch.randn(1, 6), torch.randn(6, 4), 5) == 0


def test_predicting_nothing_scores_an_auxk_of_one() -> None:
    residual = torch.randn(50, 4)
    residual -= residual.mean(dim=0)
    assert float(auxk_loss(residual, -torch.ones(50, 6), torch.randn(6, 4), 3)) == pytest.approx(1)


def test_auxk_trains_dead_latents_only_and_leaves_the_residual_alone() -> None:
    x, dead = _x(), torch.arange(D_SAE) % 2 == 0
    plain, with_auxk = (_sae(TopKConfig(d_sae=D_SAE, k=3, k_aux=4, auxk_coefficient=c)) for c in (0.0, 1.0))
    for sae in (plain, with_auxk):
        autograd_gradients(sae, x, dead, 1.0)
    for name in ("W_dec", "W_enc", "b_enc"):
        a, b = plain.get_parameter(name).grad, with_auxk.get_parameter(name).grad
        assert torch.equal(a[~dead], b[~dead])
        assert not torch.equal(a[dead], b[dead])


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_the_standard_loss_is_the_papers_formula(decoder: str) -> None:
    sae, x = _sae(StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder=decoder)), _x()
    latents = sae.encode(x)
    weights = torch.ones(D_SAE) if decoder == "unit" else sae.W_dec.norm(dim=1)
    expected = ((x - sae(x)) ** 2).sum(1).mean() + 0.3 * (latents * weights).sum(1).mean()
    losses = standard_losses(sae, x, None, 2.0)
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.fvu, ((x - sae(x)) ** 2).mean() / 2)


def test_the_mean_reduction_averages_over_all_elements() -> None:
    sae, x = _sae(StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free", reduction="mean")), _x()
    expected = ((x - sae(x)) ** 2).mean() + 0.3 * sae.encode(x).abs().mean()
    torch.testing.assert_close(standard_losses(sae, x, None, 1.0).total, expected)


def test_the_topk_loss_of_predicting_the_mean_is_one() -> None:
    x = _x(500)
    sae = build_sae(TopKConfig(d_sae=D_SAE, k=3), D_IN).double()
    sae.b_dec.data.copy_(x.mean(dim=0))
    variance = float((x - x.mean(0)).square().mean())
    with torch.no_grad():
        losses = topk_losses(sae, x, None, variance)
    assert float(losses.total) == pytest.approx(1)
    assert (float(losses.l0), int(losses.fired.sum())) == (0, 0)


def test_the_batch_topk_loss_is_that_of_the_largest_of_the_whole_batch() -> None:
    sae, x = _sae(BatchTopKConfig(d_sae=D_SAE, k=3, k_aux=0)), _x()
    pre_acts = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    cut = pre_acts.flatten().sort(descending=True).values[3 * ROWS - 1]
    latents = torch.where(pre_acts >= cut, pre_acts, 0.0)
    per_row = (latents > 0).sum(dim=1)
    assert int(per_row.sum()) == 3 * ROWS
    assert int(per_row.min()) < 3 < int(per_row.max())
    losses = batch_topk_losses(sae, x, None, 2.0)
    torch.testing.assert_close(losses.total, (latents @ sae.W_dec + sae.b_dec - x).square().mean() / 2)
    assert float(losses.l0) == 3
    assert torch.equal(losses.fired, (latents > 0).any(dim=0))


CASES = [
    StandardConfig(d_sae=D_SAE, l1_coefficient=0.3),
    StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free"),
    StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, reduction="mean"),
    StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free", reduction="mean"),
    TopKConfig(d_sae=D_SAE, k=3, k_aux=4, auxk_coefficient=0.7),
    TopKConfig(d_sae=D_SAE, k=3, k_aux=256),
    TopKConfig(d_sae=D_SAE, k=D_SAE, k_aux=0),
    BatchTopKConfig(d_sae=D_SAE, k=3, k_aux=4, auxk_coefficient=0.7),
    BatchTopKConfig(d_sae=D_SAE, k=D_SAE, k_aux=256),
]


@pytest.mark.parametrize("config", CASES, ids=repr)
@pytest.mark.parametrize("some_dead", [False, True])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_hand_written_gradients_equal_automatic_differentiation(config: SAEConfig, some_dead: bool, rows: int) -> None:
    dead = torch.arange(D_SAE) % 3 == 0 if some_dead else None
    saes = _sae(config), _sae(config)
    reference = autograd_gradients(saes[0], _x(rows), dead, 1.3)
    found = fast_gradients(saes[1], _x(rows), dead, 1.3)
    for name, expected, value in zip(reference._fields, reference, found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, check_dtype=False, msg=name)
    for name, parameter in saes[0].named_parameters():
        torch.testing.assert_close(saes[1].get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12, msg=name)
