"""Options of a run: running means of weights, clipping, warnings."""

import logging

import pytest
import torch

from sae.architectures import SAE, BatchTopKConfig, StandardConfig, TopKConfig
from sae.architectures.config import Resampling
from sae.errors import TrainingError
from sae.train.averaging import WeightAverage
from sae.train.config import TrainConfig
from sae.train.in_memory import train_in_memory, train_replicates
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step import apply_gradients, fast_gradients, make_optimizer, remove_parallel_component

CONFIG = TrainConfig(sae=TopKConfig(d_sae=12, k=2), batch_rows=32, n_tokens=960, lr=0.01)


def _x(rows: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    present = torch.rand(rows, 8, generator=generator) < 0.2
    return (present * torch.rand(rows, 8, generator=generator)) @ torch.randn(8, 4, generator=generator) * 9 + 2


def _config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate(CONFIG.model_dump() | changes)


def _run(config: TrainConfig, n_steps: int = 30) -> TrainingRun:
    rows = RowsInMemory(_x(), config.batch_rows, config.seed)
    return TrainingRun(config, DataMoments.of(_x()), n_steps, rows=rows, name="saes/0123456789abcdef")


def _weights(sae: SAE) -> list[torch.Tensor]:
    return [p.detach().clone() for p in sae.parameters()]


@pytest.mark.parametrize("sae", [CONFIG.sae, StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free")], ids=repr)
def test_the_average_is_the_weighted_mean_of_the_weights_after_each_step(sae: TopKConfig | StandardConfig) -> None:
    decay, run = 0.8, _run(_config(sae=sae, ema_decay=0.8))
    history = []
    for _ in range(7):
        run.advance(_x(32))
        history.append([p.double() for p in _weights(run.state.sae)])
    shares = torch.tensor([decay ** (6 - step) for step in range(7)], dtype=torch.float64)
    expected = [
        sum(share * p for share, p in zip(shares / shares.sum(), ps, strict=True)) for ps in zip(*history, strict=True)
    ]
    for found, wanted in zip(run.average.tensors.values(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    if run.state.sae.unit_decoder:
        assert float((run.average.tensors["W_dec"].norm(dim=1) - 1).abs().max()) > 1e-4
        norms = run.result().W_dec.norm(dim=1) * run.scale
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("wake_rate", [0, 0.25])
@pytest.mark.parametrize("sae", [TopKConfig, BatchTopKConfig])
def test_a_dead_latent_wakes_by_its_rate_in_every_step(
    sae: type[TopKConfig | BatchTopKConfig], wake_rate: float
) -> None:
    config = _config(sae=sae(d_sae=12, k=2, k_aux=0, wake_rate=wake_rate), dead_after_tokens=100)
    run = _run(config, n_steps=8)
    bias = run.state.sae.b_enc
    bias.data[3] = before = -64.0  # nothing makes it fire, and no gradient reaches it
    for step in range(8):
        run.advance(_x(32))
        if 32 * (step + 1) >= config.dead_after_tokens:
            before += wake_rate * (10 * run.peak_lr if step == 7 else run.learning_rate(step))  # it falls in the last
        assert float(bias[3].detach()) == pytest.approx(before, abs=1e-5)


def test_the_initialisation_has_no_part_in_the_average() -> None:
    sae = _run(CONFIG).state.sae
    average = WeightAverage(sae, 0.99)
    with torch.no_grad():
        sae.W_enc.fill_(3.0)
    average.update(sae, 1)
    assert torch.equal(average.tensors["W_enc"], sae.W_enc)


def test_the_average_of_a_latent_that_starts_anew_forgets_what_it_was() -> None:
    rule = Resampling(every_steps=6, silent_tokens=100, n_inputs=64)
    standard = StandardConfig(d_sae=12, l1_coefficient=0.1, resampling=rule)
    run = _run(_config(sae=standard, ema_decay=0.99, lr=1e-4))
    with torch.no_grad():
        run.state.sae.b_enc[:3] = -100.0  # silent from the start
    for _ in range(6):
        run.advance(_x(32))
    weights, average = run.state.sae, run.average.tensors
    assert bool((weights.b_enc[:3] == 0).all())
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(average[name][:3], weights.get_parameter(name)[:3])
    assert not torch.equal(average["b_enc"][3:], weights.b_enc[3:])


def test_the_average_is_saved_and_does_not_change_the_training() -> None:
    plain, averaged = _run(CONFIG), _run(_config(ema_decay=0.9))
    for _ in range(5):
        plain.advance(_x(32))
        averaged.advance(_x(32))
    assert all(map(torch.equal, _weights(plain.state.sae), _weights(averaged.state.sae)))
    wanted = averaged.average.tensors["b_enc"].clone()
    assert torch.equal(averaged.result().b_enc, wanted)
    assert not torch.equal(plain.result().b_enc, wanted)


def test_a_long_gradient_is_scaled_after_the_projection_and_before_adam() -> None:
    longest, runs = 0.05, (_run(CONFIG), _run(CONFIG))
    for run in runs:
        with torch.no_grad():  # an optimizer without memory shows the gradient that it was given
            run.state.optimizer = torch.optim.SGD(run.state.sae.parameters(), lr=0.0)
        fast_gradients(run.state.sae, _x(32) * run.scale, None, run.variance)
    sae = runs[0].state.sae
    remove_parallel_component(sae.W_dec)
    gradients = [p.grad.clone() for p in sae.parameters()]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert norm > longest
    apply_gradients(runs[1].state.sae, runs[1].state.optimizer, 0.0, longest)
    for parameter, gradient in zip(runs[1].state.sae.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (longest / norm), rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_short_enough_is_left_alone() -> None:
    plain, clipped = _run(CONFIG), _run(_config(max_grad_norm=1e6))
    for _ in range(3):
        plain.advance(_x(32))
        clipped.advance(_x(32))
    assert all(map(torch.equal, _weights(plain.state.sae), _weights(clipped.state.sae)))


def test_replicates_with_clipping_and_averaging_equal_each_trained_alone() -> None:
    x = _x(20)
    sae = StandardConfig(d_sae=6, l1_coefficient=0.1)
    config = _config(sae=sae, batch_rows=20, n_tokens=400, max_grad_norm=0.1, ema_decay=0.9)
    for seed, found in zip([5, 6], train_replicates(x, config, [5, 6]), strict=True):
        assert torch.equal(found.W_dec, train_in_memory(x, config, seed=seed).W_dec)


def test_the_learning_rate_falls_with_the_width_and_with_the_length_of_the_run() -> None:
    of = {d_sae: TrainConfig(sae=TopKConfig(d_sae=d_sae, k=2)) for d_sae in (2048, 8192)}
    assert of[2048].peak_lr(1000) == of[2048].peak_lr(2**21) == 6.5e-3
    assert of[8192].peak_lr(1000) == pytest.approx(3.25e-3)
    assert of[2048].peak_lr(4 * 2**21) == pytest.approx(3.25e-3)
    assert _config(lr=0.25).peak_lr(4 * 2**21) == 0.25
    run = _run(of[2048], n_steps=4 * 2**21 // of[2048].batch_rows)
    assert max(run.learning_rate(step) for step in range(run.n_steps)) == pytest.approx(3.25e-3)


def test_all_latents_dead_is_told_once_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    config = _config(sae=StandardConfig(d_sae=6, l1_coefficient=500.0), dead_after_tokens=100, lr=0.1)
    run = _run(config)
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            run.advance(_x(32))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("saes/0123456789abcdef: at step ")
    assert "all 6 latents are dead: none has fired for 100 tokens. Lower lr" in line


def test_weights_that_are_not_finite_are_noticed_before_they_are_kept() -> None:
    run = _run(CONFIG)
    run.advance(_x(32))
    run.check_finite()
    with torch.no_grad():
        run.state.sae.b_enc[3] = torch.inf
    with pytest.raises(TrainingError, match=r"b_enc holds values that are not finite after step 1 of 30 \(batch 0"):
        run.check_finite()


def test_the_optimizer_is_adam_over_all_parameters() -> None:
    sae = _run(CONFIG).state.sae
    (group,) = make_optimizer(sae, (0.9, 0.99)).param_groups
    assert len(group["params"]) == 4
