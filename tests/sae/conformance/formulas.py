"""What the papers say, in float64 numpy: one row and one latent at a time, gradients by finite differences.

Nothing of `sae` is used here. Weights are a dict of W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in] and
b_dec [d_in].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Weights = dict[str, np.ndarray]


def pre_activation(w: Weights, x: np.ndarray, latent: int, pre_bias: bool = True) -> float:
    """h_i = W_e[i] . (x - b_d) + b_e[i]; without a pre-bias W_e[i] . x + b_e[i]."""
    seen = x - w["b_dec"] if pre_bias else x
    return float(w["W_enc"][latent] @ seen + w["b_enc"][latent])


def reconstruction(w: Weights, f: np.ndarray) -> np.ndarray:
    """x_hat = b_d + sum_i f_i d_i, of one row."""
    x_hat = w["b_dec"].copy()
    for latent, value in enumerate(f):
        x_hat += value * w["W_dec"][latent]
    return x_hat


def squared_norm(v: np.ndarray) -> float:
    """||v||^2"""
    return float(v @ v)


@dataclass(frozen=True)
class Standard:
    """Bricken et al. 2023; with `april_2024` Anthropic's update of April 2024."""

    l1: float
    april_2024: bool = False

    @property
    def unit_decoder(self) -> bool:
        return not self.april_2024

    def latents(self, w: Weights, batch: np.ndarray) -> np.ndarray:
        """f = ReLU(h). Only the 2023 form has a pre-bias. [rows, d_sae]"""
        f = np.zeros((len(batch), len(w["b_enc"])))
        for row, x in enumerate(batch):
            for latent in range(f.shape[1]):
                f[row, latent] = max(0.0, pre_activation(w, x, latent, pre_bias=not self.april_2024))
        return f

    def loss(self, w: Weights, batch: np.ndarray, dead: np.ndarray, residual: np.ndarray, variance: float) -> float:
        """Mean over rows of ||x - x_hat||^2 + lambda sum_i f_i; in 2024 every f_i is weighed by ||d_i||."""
        total = 0.0
        for x, f in zip(batch, self.latents(w, batch), strict=True):
            total += squared_norm(x - reconstruction(w, f))
            for latent, value in enumerate(f):
                weight = squared_norm(w["W_dec"][latent]) ** 0.5 if self.april_2024 else 1.0
                total += self.l1 * value * weight
        return total / len(batch)


@dataclass(frozen=True)
class TopK:
    """Gao et al. 2024; with `whole_batch` Bussmann et al. 2024, in training."""

    k: int
    k_aux: int
    auxk_coefficient: float
    whole_batch: bool = False
    unit_decoder: bool = True

    def latents(self, w: Weights, batch: np.ndarray) -> np.ndarray:
        """The k largest h of every row, or the rows * k largest of all rows, after ReLU; the others are 0."""
        n_rows, n_latents = len(batch), len(w["b_enc"])
        h = {(r, i): pre_activation(w, batch[r], i) for r in range(n_rows) for i in range(n_latents)}
        if self.whole_batch:
            kept = sorted(h, key=lambda place: -h[place])[: n_rows * self.k]
        else:
            kept = []
            for row in range(n_rows):
                places = [(row, latent) for latent in range(n_latents)]
                kept += sorted(places, key=lambda place: -h[place])[: self.k]
        f = np.zeros((n_rows, n_latents))
        for place in kept:
            f[place] = max(0.0, h[place])
        return f

    def loss(self, w: Weights, batch: np.ndarray, dead: np.ndarray, residual: np.ndarray, variance: float) -> float:
        """Mean squared error over the variance of the data, plus AuxK times its coefficient."""
        error = 0.0
        for x, f in zip(batch, self.latents(w, batch), strict=True):
            error += squared_norm(x - reconstruction(w, f))
        return error / batch.size / variance + self.auxk_coefficient * self.auxk(w, batch, dead, residual)

    def auxk(self, w: Weights, batch: np.ndarray, dead: np.ndarray, residual: np.ndarray) -> float:
        """||e - e_hat||^2 over the residual's variance. e is a constant; e_hat has no bias, only dead latents."""
        candidates = [latent for latent in range(len(dead)) if dead[latent]]
        if not candidates:
            return 0.0
        error = spread = 0.0
        for x, e in zip(batch, residual, strict=True):
            h = {latent: pre_activation(w, x, latent) for latent in candidates}
            strongest = sorted(h, key=lambda latent: -h[latent])[: self.k_aux]
            e_hat = np.zeros_like(e)
            for latent in strongest:
                e_hat += max(0.0, h[latent]) * w["W_dec"][latent]
            error += squared_norm(e - e_hat)
            spread += squared_norm(e - residual.mean(axis=0))
        return error / spread


Form = Standard | TopK


def residual(form: Form, w: Weights, batch: np.ndarray) -> np.ndarray:
    """e = x - x_hat. [rows, d_in]"""
    return np.stack([x - reconstruction(w, f) for x, f in zip(batch, form.latents(w, batch), strict=True)])


def gradient(loss: Callable[[Weights], float], w: Weights, step: float = 1e-6) -> Weights:
    """Central differences of a loss with respect to every weight."""
    found = {name: np.zeros_like(value) for name, value in w.items()}
    for name, value in w.items():
        for place in np.ndindex(value.shape):
            moved = []
            for sign in (1, -1):
                there = {key: array.copy() for key, array in w.items()}
                there[name][place] += sign * step
                moved.append(loss(there))
            found[name][place] = (moved[0] - moved[1]) / (2 * step)
    return found


@dataclass
class Adam:
    """Kingma and Ba 2015."""

    betas: tuple[float, float]
    eps: float = 6.25e-10
    t: int = 0
    m: Weights = field(default_factory=dict)
    v: Weights = field(default_factory=dict)

    def step(self, w: Weights, g: Weights, lr: float) -> None:
        self.t += 1
        for name, value in g.items():
            self.m[name] = self.betas[0] * self.m.get(name, 0.0) + (1 - self.betas[0]) * value
            self.v[name] = self.betas[1] * self.v.get(name, 0.0) + (1 - self.betas[1]) * value**2
            m_hat = self.m[name] / (1 - self.betas[0] ** self.t)
            v_hat = self.v[name] / (1 - self.betas[1] ** self.t)
            w[name] = w[name] - lr * m_hat / (np.sqrt(v_hat) + self.eps)


def clipped(g: Weights, longest: float) -> Weights:
    """The gradient scaled down to a norm, over all weights together, of at most `longest`."""
    norm = sum(float((value**2).sum()) for value in g.values()) ** 0.5
    return {name: value * min(1.0, longest / norm) for name, value in g.items()}


@dataclass
class Trained:
    """What training went through."""

    weights: Weights
    losses: list[float]
    """Of every step, before it."""
    dead: list[np.ndarray]
    """At every step. each bool [d_sae]"""


def train(
    form: Form,
    weights: Weights,
    batches: Sequence[np.ndarray],
    lr: float,
    betas: tuple[float, float],
    variance: float,
    dead_after_tokens: int,
) -> Trained:
    """Steps of Adam. Where decoder rows have norm 1, the gradient along each row goes before Adam sees it, and rows get
    norm 1 again after the step. A latent is dead that has not fired for so many rows."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    adam, since_fired = Adam(betas), np.zeros(len(w["b_enc"]))
    found = Trained(w, [], [])
    for batch in batches:
        dead = since_fired >= dead_after_tokens
        e = residual(form, w, batch)

        def loss(there: Weights, batch: np.ndarray = batch, dead: np.ndarray = dead, e: np.ndarray = e) -> float:
            return form.loss(there, batch, dead, e, variance)

        found.losses.append(loss(w))
        found.dead.append(dead)
        fired = (form.latents(w, batch) > 0).any(axis=0)
        g = gradient(loss, w)
        if form.unit_decoder:
            for row, direction in enumerate(w["W_dec"]):
                g["W_dec"][row] -= (g["W_dec"][row] @ direction) * direction
        adam.step(w, g, lr)
        if form.unit_decoder:
            for row in range(len(w["W_dec"])):
                w["W_dec"][row] /= squared_norm(w["W_dec"][row]) ** 0.5
        since_fired = np.where(fired, 0, since_fired + len(batch))
    return found
