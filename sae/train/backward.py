"""Gradients by hand: what automatic differentiation of `losses.py` gives, in fewer and smaller products.

TopK: 2 B d (n + 4 k) instead of 10 B d n FLOPs. Only the encoder's product is dense; decoding and the gradients of
both matrices are `embedding_bag`s over the selected (row, latent) pairs, and no [batch * k, d_in] buffer is made.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.standard import StandardSAE
from sae.architectures.topk import TopKSAE
from sae.train.losses import Losses, auxk_loss, batch_topk_losses, fired_latents


@torch.no_grad()
def standard_gradients(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """`standard_losses`, with the gradient of every parameter left in it.

    Parameters may have a leading dimension, several SAEs stacked: then so have the losses.
    """
    sae = cast(StandardSAE, sae)
    config, (n_rows, d_in) = sae.config, x.shape
    x_in = x - sae.b_dec.unsqueeze(-2) if sae.subtracts_b_dec else x
    latents = torch.matmul(x_in, sae.W_enc.mT).add_(sae.b_enc.unsqueeze(-2)).relu_()
    error = torch.matmul(latents, sae.W_dec).add_(sae.b_dec.unsqueeze(-2)).sub_(x)
    mse = error.square().mean(dim=(-2, -1))
    summed = config.reduction == "sum"
    weighed = summed and not sae.unit_decoder

    # reduction "sum": all sums are divided by the rows; "mean": by the elements.
    reconstruction = mse * d_in if summed else mse
    per_latent = config.l1_coefficient / (n_rows if summed else n_rows * config.d_sae)
    norm = sae.W_dec.norm(dim=-1) if weighed else None
    mass = latents.sum(dim=-2)
    aux = per_latent * (mass if norm is None else mass * norm).sum(dim=-1)
    positive = latents > 0

    d_x_hat = error.mul_(2 / (n_rows if summed else n_rows * d_in))
    d_pre_acts = torch.matmul(d_x_hat, sae.W_dec.mT)
    d_pre_acts.add_(per_latent if norm is None else per_latent * norm.unsqueeze(-2)).mul_(positive)
    sae.W_dec.grad = latents.mT @ d_x_hat
    if norm is not None:
        along = per_latent * mass / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        sae.W_dec.grad += along.unsqueeze(-1) * sae.W_dec
    _encoder_gradients(sae, d_pre_acts.mT @ x_in, d_pre_acts.sum(dim=-2), d_x_hat.sum(dim=-2))
    return Losses(
        total=reconstruction + aux,
        fvu=mse / variance,
        l0=positive.sum(dim=(-2, -1)) / n_rows,
        aux=aux,
        fired=positive.any(dim=-2),
    )


@torch.no_grad()
def topk_gradients(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """`topk_losses`, with the gradient of every parameter left in it."""
    sae = cast(TopKSAE, sae)
    x_in = x - sae.b_dec
    pre_acts = F.linear(x_in, sae.W_enc, sae.b_enc)
    values, latents = sae.select(pre_acts)
    positive = values > 0
    with torch.enable_grad():
        values.requires_grad_()
        decoded = F.embedding_bag(latents, sae.W_dec.detach(), per_sample_weights=values, mode="sum")
    error = decoded.detach() + (sae.b_dec - x)
    fvu = error.square().mean() / variance
    d_x_hat = error * (2 / (error.numel() * variance))
    # The backward pass of this one operation is dot(W_dec[latent], d_x_hat[row]) for every pair.
    (d_values,) = torch.autograd.grad(decoded, values, d_x_hat)
    d_values *= positive

    pairs = _PairsByLatent(latents, sae.d_sae)
    sae.W_dec.grad = pairs.weighted_sums(values.detach(), d_x_hat)
    d_W_enc = pairs.weighted_sums(d_values, x_in)
    d_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, latents.flatten(), d_values.flatten())
    aux = torch.zeros_like(fvu)
    if dead is not None and sae.config.k_aux > 0:
        which = dead.nonzero().squeeze(1)
        with torch.enable_grad():
            dead_pre_acts = pre_acts[:, which].requires_grad_()
            dead_W_dec = sae.W_dec.detach()[which].requires_grad_()
            auxk = auxk_loss(-error, dead_pre_acts, dead_W_dec, sae.config.k_aux)
            aux = sae.config.auxk_coefficient * auxk
        d_pre_acts, d_W_dec = torch.autograd.grad(aux, (dead_pre_acts, dead_W_dec))
        aux = aux.detach()
        sae.W_dec.grad[which] += d_W_dec
        d_W_enc[which] += d_pre_acts.T @ x_in
        d_b_enc[which] += d_pre_acts.sum(dim=0)
    _encoder_gradients(sae, d_W_enc, d_b_enc, d_x_hat.sum(dim=0))
    return Losses(
        total=fvu + aux,
        fvu=fvu,
        l0=positive.sum() / len(x),
        aux=aux,
        fired=fired_latents(latents, positive, sae.d_sae),
    )


def batch_topk_gradients(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """`batch_topk_losses`, differentiated automatically, with the gradient of every parameter left in it."""
    sae.zero_grad(set_to_none=True)
    with torch.enable_grad():
        losses = batch_topk_losses(sae, x, dead, variance)
        losses.total.backward()
    return losses._replace(total=losses.total.detach())


class _PairsByLatent:
    """The selected (row, latent) pairs of a batch, grouped by latent. latents: [batch, k]"""

    def __init__(self, latents: Tensor, d_sae: int) -> None:
        flat = latents.flatten()
        # Stable: the sums below add up in row order, whatever the sorting algorithm.
        by_latent, self._order = flat.sort(stable=True)
        self._rows = self._order // latents.shape[1]
        self._starts = torch.searchsorted(by_latent, torch.arange(d_sae + 1, device=flat.device))

    def weighted_sums(self, weights: Tensor, vectors: Tensor) -> Tensor:
        """Per latent: the sum over its pairs of weight * vectors[row]. [batch, k], [batch, d] -> [d_sae, d]"""
        return F.embedding_bag(
            self._rows,
            vectors,
            self._starts,
            mode="sum",
            per_sample_weights=weights.flatten()[self._order],
            include_last_offset=True,
        )


def _encoder_gradients(sae: SAE, d_W_enc: Tensor, d_b_enc: Tensor, d_b_dec: Tensor) -> None:
    """Set the gradients of the encoder and of b_dec, which also reaches the loss through the encoder's input."""
    sae.W_enc.grad, sae.b_enc.grad = d_W_enc, d_b_enc
    through_input = (d_b_enc.unsqueeze(-2) @ sae.W_enc).squeeze(-2)
    sae.b_dec.grad = d_b_dec - through_input if sae.subtracts_b_dec else d_b_dec


GRADIENTS: dict[str, Callable[[SAE, Tensor, Tensor | None, float], Losses]] = {
    "batch_topk": batch_topk_gradients,
    "standard": standard_gradients,
    "topk": topk_gradients,
}
"""By architecture, beside the same losses in `losses.LOSSES`."""
