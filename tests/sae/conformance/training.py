"""Steps and whole runs of the library beside those of the formulas, from equal weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sae.architectures import SAE, BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig, build_sae
from sae.train.config import TrainConfig
from sae.train.dead_latents import DeadLatentClock
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step import TrainState, autograd_gradients, fast_gradients, make_optimizer, train_step
from tests.sae.conformance import formulas
from tests.sae.conformance.formulas import Form, Standard, TopK, Trained, Weights

D_IN, D_SAE = 4, 6
VARIANCE, LR, BETAS, DEAD_AFTER_TOKENS = 1.7, 0.01, (0.9, 0.99), 12
FORMS: dict[str, tuple[SAEConfig, Form]] = {
    "standard 2023": (StandardConfig(d_sae=D_SAE, l1_coefficient=0.3), Standard(0.3)),
    "standard 2024": (
        StandardConfig(d_sae=D_SAE, l1_coefficient=0.3, decoder="free"),
        Standard(0.3, april_2024=True),
    ),
    "topk": (TopKConfig(d_sae=D_SAE, k=2, k_aux=1, auxk_coefficient=0.5), TopK(2, 1, 0.5)),
    "batch_topk": (
        BatchTopKConfig(d_sae=D_SAE, k=2, k_aux=1, auxk_coefficient=0.5),
        TopK(2, 1, 0.5, whole_batch=True),
    ),
}


def _start(unit_decoder: bool) -> Weights:
    """The last two latents are far below the others, and on most rows above zero: they die, and AuxK reaches them."""
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((D_SAE, D_IN))
    if unit_decoder:
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    W_enc, b_enc = 0.5 * rng.standard_normal((D_SAE, D_IN)), np.full(D_SAE, 2.0)
    W_enc[4:] *= 0.1
    b_enc[4:] = 0.05
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": 0.3 * rng.standard_normal(D_IN)}


def _batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((rows, D_IN)) + 0.5 for rows in (8, 8, 4, 8, 8, 8)]


@functools.cache
def _by_the_formulas(name: str) -> Trained:
    form = FORMS[name][1]
    found = formulas.train(form, _start(form.unit_decoder), _batches(), LR, BETAS, VARIANCE, DEAD_AFTER_TOKENS)
    if isinstance(form, TopK):
        assert not found.dead[1].any(), "12 tokens are more than a batch"
        assert found.dead[2].tolist() == [False] * 4 + [True] * 2, "and fewer than two"
    return found


def steps(name: str) -> None:
    """Six steps, by automatic differentiation and by hand, from weights of which two latents die."""
    config, form = FORMS[name]
    expected = _by_the_formulas(name)
    for gradients in (autograd_gradients, fast_gradients):
        sae = build_sae(config, D_IN).double()
        for parameter, value in _start(form.unit_decoder).items():
            sae.get_parameter(parameter).data.copy_(torch.from_numpy(value))
        state = TrainState(sae, make_optimizer(sae, BETAS), DeadLatentClock(D_SAE, DEAD_AFTER_TOKENS))
        losses = [
            train_step(state, torch.from_numpy(batch), LR, VARIANCE, gradients).total.item() for batch in _batches()
        ]
        # Finite differences are good to nine digits, of which Adam's division leaves fewer.
        np.testing.assert_allclose(losses, expected.losses, rtol=1e-6)
        _assert_weights(sae, expected.weights, atol=1e-5)
        if form.unit_decoder:
            torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


@dataclass
class _Run:
    """A run of the library on rows in memory, one full batch a step."""

    run: TrainingRun
    start: Weights

    def finish(self, x: np.ndarray) -> SAE:
        while not self.run.finished:
            self.run.advance(torch.from_numpy(x).float())
        return self.run.result()


def _run(config: TrainConfig, x: np.ndarray, n_steps: int) -> _Run:
    rows = torch.from_numpy(x).float()
    run = TrainingRun(config, DataMoments.of(rows), n_steps, rows, rows=RowsInMemory(rows, len(rows), seed=0))
    start = {name: parameter.detach().double().numpy().copy() for name, parameter in run.state.sae.named_parameters()}
    return _Run(run, start)


def _rows() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((12, D_IN)) * 3 + 2


def run_2023() -> None:
    """Initialisation, input scale (here that of the variance: lambda belongs to it), eight steps, units of the data."""
    x, n_steps = _rows(), 8
    config = TrainConfig(
        sae=StandardConfig(d_sae=D_SAE, l1_coefficient=0.3),
        batch_rows=12,
        lr=LR,
        warmup_fraction=0,
        decay_fraction=0,
        adam_betas=(0.9, 0.999),
        init="kaiming",
    )
    ours = _run(config, x, n_steps)
    scale = 1 / np.sqrt(((x - x.mean(axis=0)) ** 2).mean())
    form = Standard(0.3)
    expected = _trained_2023(form, ours.start, scale * x, n_steps)
    f = form.latents(expected, scale * x)
    x_hat = np.stack([formulas.reconstruction(expected, row) for row in f]) / scale
    _assert_outputs(ours.finish(x), x, f, x_hat)


def run_2024() -> None:
    """E ||x|| = sqrt(d), lambda over the first half, learning rate down over the last fifth, gradients clipped at 1;
    norms folded into the encoder, units of the data."""
    x, n_steps = _rows(), 10
    config = TrainConfig(
        sae=StandardConfig(d_sae=D_SAE, l1_coefficient=2, decoder="free", l1_warmup_fraction=0.5),
        batch_rows=12,
        lr=LR,
        warmup_fraction=0,
        decay_fraction=0.2,
        adam_betas=(0.9, 0.999),
        max_grad_norm=1,
        init="small",
        input_scale="sqrt_d",
    )
    ours = _run(config, x, n_steps)
    np.testing.assert_allclose(np.linalg.norm(ours.start["W_dec"], axis=1), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(ours.start["W_enc"], ours.start["W_dec"])
    assert not ours.start["b_enc"].any()
    assert not ours.start["b_dec"].any()
    scale = D_IN**0.5 / np.linalg.norm(x, axis=1).mean()
    w = _trained_2024(ours.start, scale * x, n_steps)
    f = Standard(0, april_2024=True).latents(w, scale * x)
    x_hat = np.stack([formulas.reconstruction(w, row) for row in f]) / scale
    _assert_outputs(ours.finish(x), x, f * np.linalg.norm(w["W_dec"], axis=1), x_hat)


_KEPT: dict[str, Weights] = {}


def _once(name: str, make: Callable[[], Weights]) -> Weights:
    """What the formulas give, computed before a mistake is planted and kept."""
    if name not in _KEPT:
        _KEPT[name] = make()
    return _KEPT[name]


def _trained_2023(form: Form, start: Weights, x: np.ndarray, n_steps: int) -> Weights:
    return _once("2023", lambda: formulas.train(form, start, [x] * n_steps, LR, (0.9, 0.999), VARIANCE, 10**9).weights)


def _trained_2024(start: Weights, x: np.ndarray, n_steps: int) -> Weights:
    def make() -> Weights:
        w, adam = dict(start), formulas.Adam((0.9, 0.999))
        nothing = np.zeros(0)
        for step in range(n_steps):
            form = Standard(2 * min(1.0, (step + 1) / 5), april_2024=True)
            g = formulas.gradient(lambda there, form=form: form.loss(there, x, nothing, nothing, 1.0), w)
            adam.step(w, formulas.clipped(g, 1.0), LR * min(1.0, (n_steps - step) / 2))
        return w

    return _once("2024", make)


def _assert_weights(sae: SAE, expected: Weights, atol: float) -> None:
    for name, parameter in sae.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=0, atol=atol, err_msg=name)


def _assert_outputs(sae: SAE, x: np.ndarray, f: np.ndarray, x_hat: np.ndarray) -> None:
    """In float32, to what Adam makes of its rounding."""
    rows = torch.from_numpy(x).float()
    with torch.no_grad():
        np.testing.assert_allclose(sae.encode(rows).numpy(), f, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(sae(rows).numpy(), x_hat, rtol=2e-3, atol=2e-3)
