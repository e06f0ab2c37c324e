"""Values worked by hand. A check returns when the library agrees, and raises AssertionError where it does not."""

import pytest
import torch
from torch import Tensor

from sae.architectures import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.standard import StandardSAE
from sae.metrics import ReconstructionSums
from sae.train.dead_latents import DeadLatentClock
from sae.train.init import initialise
from sae.train.losses import Losses
from sae.train.resampling import resample
from sae.train.rows import RowsInMemory
from sae.train.step import TrainState, autograd_gradients, fast_gradients, make_optimizer
from sae.train.threshold import calibrate


def _losses(
    config: SAEConfig, weights: tuple[list, list, list, list], x: Tensor, dead: Tensor | None, variance: float
) -> list[Losses]:
    """By automatic differentiation and by hand. weights: W_enc, b_enc, W_dec, b_dec"""
    found = []
    for gradients in (autograd_gradients, fast_gradients):
        sae = build_sae(config, x.shape[1]).double()
        for name, value in zip(("W_enc", "b_enc", "W_dec", "b_dec"), weights, strict=True):
            sae.get_parameter(name).data.copy_(torch.tensor(value))
        found.append(gradients(sae, x.double(), dead, variance))
    return found


def standard_2023() -> None:
    """Row (3, 2): h = 2.5, 0, -3, x_hat = (3.5, 1), error 1.25, L1 2.5. Row (1, 4): f = .5, 2, 0, the same two."""
    weights = ([[1, 0], [0, 1], [-1, -1]], [0.5, -1, 0], [[1, 0], [0, 1], [0.6, 0.8]], [1, 1])
    x = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
    for losses in _losses(StandardConfig(d_sae=3, l1_coefficient=0.1), weights, x, None, 1.0):
        assert losses.total.item() == pytest.approx(1.25 + 0.1 * 2.5)
        assert losses.l0.item() == 1.5
        assert losses.fired.tolist() == [True, True, False]


def standard_2024() -> None:
    """Nothing is subtracted. Row (3, 2): f = 3.5, 1, 0, x_hat = (8, 2), error 25, 3.5 * 2 + 1 * 1 = 8. Row (1, 4):
    f = 1.5, 3, 0, x_hat = (4, 4), error 9, 1.5 * 2 + 3 * 1 = 6."""
    weights = ([[1, 0], [0, 1], [-1, -1]], [0.5, -1, 0], [[2, 0], [0, 1], [1, 1]], [1, 1])
    x = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
    config = StandardConfig(d_sae=3, l1_coefficient=0.1, decoder="free")
    for losses in _losses(config, weights, x, None, 1.0):
        assert losses.total.item() == pytest.approx((25 + 0.8 + 9 + 0.6) / 2)


TOPK_WEIGHTS = ([[1, 0], [0, 1], [0.5, 0.5]], [0, 0, 0], [[1, 0], [0, 1], [0.6, 0.8]], [1, 0])


def topk() -> None:
    """x - b_d = (2, 1), (0, 4), (1, 3); the largest of h is kept; e = (0, 1), (0, 0), (1, 0): 2 / 6 / variance.

    AuxK, latent 2 dead: h = 1.5, 2, 2, so e_hat = (.9, 1.2), (1.2, 1.6), (1.2, 1.6) and ||e - e_hat||^2 = .85, 4, 2.6;
    the residual's spread about its mean (1/3, 1/3) is 4/3.
    """
    x = torch.tensor([[3.0, 1.0], [1.0, 4.0], [2.0, 3.0]])
    config = TopKConfig(d_sae=3, k=1, k_aux=1, auxk_coefficient=1 / 32)
    dead = torch.tensor([False, False, True])
    for losses in _losses(config, TOPK_WEIGHTS, x, dead, 2.0):
        assert losses.fvu.item() == pytest.approx(2 / 6 / 2)
        assert losses.aux.item() == pytest.approx(7.45 / (4 / 3) / 32)
        assert losses.total.item() == pytest.approx(2 / 6 / 2 + 7.45 / (4 / 3) / 32)


def topk_of_few_positive() -> None:
    """x - b_d = (2, -4): the two largest of h = 2, -4, -1 are 2 and -1, and f = 2, 0, 0; e = (0, -4)."""
    for losses in _losses(TopKConfig(d_sae=3, k=2), TOPK_WEIGHTS, torch.tensor([[3.0, -4.0]]), None, 2.0):
        assert losses.total.item() == pytest.approx(16 / 2 / 2)
        assert losses.l0.item() == 1


def batch_topk() -> None:
    """x - b_d = (.5, .5), (0, 5), (1, 3): of all h the largest three are 5 and 2.5 in the second row, 3 in the third.
    The first keeps none: e = (.5, .5), (-1.5, -2), (1, 0)."""
    x = torch.tensor([[1.5, 0.5], [1.0, 5.0], [2.0, 3.0]])
    for losses in _losses(BatchTopKConfig(d_sae=3, k=1), TOPK_WEIGHTS, x, None, 2.0):
        assert losses.total.item() == pytest.approx((0.5 + 6.25 + 1) / 6 / 2)
        assert losses.l0.item() == 1
        assert losses.fired.tolist() == [False, True, True]


def batch_topk_at_inference() -> None:
    """One threshold decides about each row alone."""
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=4, k=1), 2)
    sae.threshold.fill_(1.0)
    for rows in ([[0.5, 2.0, -2.0, 1.0]], [[0.5, 2.0, -2.0, 1.0], [9.0, 9.0, 9.0, 9.0]]):
        assert sae.activate(torch.tensor(rows))[0].tolist() == [0.0, 2.0, 0.0, 0.0]


def threshold() -> None:
    """Rows 1 to 10 with h = x and x / 2, k = 1: the ten largest are 10 to 5, 5 again, 4.5, 4 and 4; the next is 3.5."""
    sae = BatchTopKSAE(BatchTopKConfig(d_sae=2, k=1), 1)
    sae.W_enc.data.copy_(torch.tensor([[1.0], [0.5]]))
    x = torch.arange(1.0, 11.0)[:, None]
    found = calibrate(sae, RowsInMemory(x, 3, seed=0))
    assert sae.threshold.item() == 3.75
    assert int((sae.encode(x) > 0).sum()) == 10
    assert found.l0 == 1


def dead_clock() -> None:
    """After 60 and 60 rows a latent has been silent for 120 tokens, in two steps; after ten steps of 5 rows, for 50."""
    clock = DeadLatentClock(2, dead_after_tokens=100)
    fired = torch.tensor([True, False])
    clock.update(fired, 60)
    assert clock.dead.tolist() == [False, False]
    clock.update(fired, 60)
    assert clock.dead.tolist() == [False, True]
    clock = DeadLatentClock(2, dead_after_tokens=100)
    for _ in range(10):
        clock.update(fired, 5)
    assert clock.tokens_since_fired.tolist() == [0, 50]


def fvu_of_offset_data() -> None:
    """Rows 100, 102, then 104, 106, each reconstructed 1 too high: error 4, deviation from 103 is 9 + 1 + 1 + 9."""
    sums = ReconstructionSums()
    for rows in ([100.0, 102.0], [104.0, 106.0]):
        x = torch.tensor(rows)[:, None]
        sums.add(x, x + 1)
    assert sums.fvu == pytest.approx(4 / 20)
    assert sums.fvu_mean_of_batches == pytest.approx(1)
    assert sums.fvu_centred_per_batch == pytest.approx(0)


def geometric_median() -> None:
    """Of 0, 1, 1, 2 and 3000 it is 1, where the mean is 600.8."""
    sae = build_sae(StandardConfig(d_sae=2, l1_coefficient=0), 1)
    sample = torch.tensor([[0.0], [1.0], [2.0], [1.0], [3000.0]])
    initialise(sae, "kaiming", 0, sample.mean(dim=0), sample)
    assert sae.b_dec.item() == pytest.approx(1, abs=1e-3)


def resampled_latent() -> None:
    """The encoder rows of alive latents have norms 5 and 1, so a new one has .2 * 3; the silent 10 is left out."""
    sae = StandardSAE(StandardConfig(d_sae=3, l1_coefficient=0.1), 2)
    sae.W_enc.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]))
    sae.W_dec.data.copy_(torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.6, 0.8]]))
    sae.b_enc.data.copy_(torch.tensor([1.0, 2.0, 7.0]))
    state = TrainState(sae, make_optimizer(sae, (0.9, 0.99)), DeadLatentClock(3, 10**9))
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()  # with a learning rate of 0: Adam has moments, and no weight moves
    state.clock.tokens_since_fired.copy_(torch.tensor([0, 5, 100]))
    resample(state, [torch.tensor([[3.0, 0.0]])], 100, seed=0)
    torch.testing.assert_close(sae.W_enc.detach(), torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.6, 0.0]]))
    torch.testing.assert_close(sae.W_dec.detach(), torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]]))
    assert sae.b_enc.tolist() == [1.0, 2.0, 0.0]
    assert state.clock.tokens_since_fired.tolist() == [0, 5, 0]
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = state.optimizer.state[parameter][moment].reshape(3, -1).any(dim=1)
            assert kept.tolist() == [True, True, False]


def resampled_inputs() -> None:
    """An SAE of zeros has the losses ||x||^2 = 1 and 3: drawn by their squares, the second nine times in ten."""
    sae = StandardSAE(StandardConfig(d_sae=2, l1_coefficient=0.1), 2)
    state = TrainState(sae, make_optimizer(sae, (0.9, 0.99)), DeadLatentClock(2, 10**9))
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0**0.5]])
    n_second, n_draws = 0, 400
    for seed in range(n_draws):
        sae.W_dec.data.zero_()
        state.clock.tokens_since_fired[0] = 100
        resample(state, [x], 100, seed)
        n_second += sae.W_dec[0, 1].item() > 0.5
    # Three in four by the loss itself; the spread of the share is .015.
    assert n_second / n_draws == pytest.approx(0.9, abs=0.07)
