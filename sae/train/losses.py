"""The losses, term by term, and which architecture uses which.

A coefficient means nothing without its reduction and the scale of the inputs: both stand in each docstring. The
variance of the inputs is a constant of the data, not of the batch, so a batch of one row is as good as any.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.standard import StandardSAE
from sae.architectures.topk import TopKSAE


class Losses(NamedTuple):
    """The loss of a batch and what is watched beside it. Tensors, so that nothing waits for the device."""

    total: Tensor
    """What is minimised. Scalar."""
    fvu: Tensor
    """Mean squared error over the variance of the inputs. Scalar, detached."""
    l0: Tensor
    """Mean number of positive latents per row. Scalar."""
    aux: Tensor
    """The second term of the loss, its coefficient included: L1 (standard) or AuxK (the others). Scalar, detached."""
    fired: Tensor
    """Which latents were positive in some row. bool [d_sae]"""


def l1_loss(latents: Tensor, decoder_norm: Tensor | None = None) -> Tensor:
    """The sum of a row's latents, averaged over rows.

    Args:
        latents: none negative. [batch, d_sae]
        decoder_norm: weighs each latent by the norm of its decoder row, so that a free decoder cannot cheat. [d_sae]
    Returns: scalar.
    Source: Bricken et al. 2023; weighed: Anthropic's April 2024 update.
    """
    per_latent = latents.mean(dim=0)
    return per_latent.sum() if decoder_norm is None else per_latent @ decoder_norm


def auxk_loss(residual: Tensor, dead_pre_acts: Tensor, W_dec: Tensor, k_aux: int) -> Tensor:
    """How well the k_aux strongest dead latents predict what the live ones missed.

    The candidates are decoded without b_dec, which the residual does not contain.

    Args:
        residual: x - x_hat, detached. [batch, d_in]
        dead_pre_acts: pre-activations of the dead latents. [batch, n_dead]
        W_dec: decoder rows of the dead latents. [n_dead, d_in]
        k_aux: capped by the number of dead latents.
    Returns: scalar, squared error divided by the variance of `residual` about its batch mean; 0.0 when no latent is
        dead or the residual has no variance.
    Source: Gao et al. 2024, arXiv:2406.04093, appendix A.2.
    """
    if len(W_dec) == 0:
        return residual.new_zeros(())
    values, chosen = dead_pre_acts.topk(min(k_aux, len(W_dec)), dim=-1, sorted=False)
    predicted = torch.zeros_like(dead_pre_acts).scatter(-1, chosen, values.relu()) @ W_dec
    variance = (residual - residual.mean(dim=0)).square().mean()
    error = (predicted - residual).square().mean()
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)


def standard_losses(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """Squared error plus L1.

    reduction "sum": ||x - x_hat||^2 + lambda sum_i f_i (times ||W_dec_i|| with a free decoder), mean over rows.
    reduction "mean": mean over all elements of (x - x_hat)^2, plus lambda times the mean over all elements of f.
    """
    sae = cast(StandardSAE, sae)
    latents = sae.encode(x)
    mse = (sae.decode(latents) - x).square().mean()
    if sae.config.reduction == "sum":
        reconstruction = mse * sae.d_in
        penalty = l1_loss(latents, None if sae.unit_decoder else sae.W_dec.norm(dim=1))
    else:
        reconstruction = mse
        penalty = latents.mean()
    aux = sae.l1_coefficient * penalty
    positive = latents.detach() > 0
    return Losses(
        total=reconstruction + aux,
        fvu=mse.detach() / variance,
        l0=positive.sum() / len(x),
        aux=aux.detach(),
        fired=positive.any(dim=0),
    )


def topk_losses(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """Mean squared error over the variance of the inputs, plus AuxK.

    Args:
        dead: latents that are dead. bool [d_sae]; None when none is.
        variance: of the inputs, per element, about their mean.
    Source: Gao et al. 2024, arXiv:2406.04093, section 2.
    """
    sae = cast(TopKSAE, sae)
    pre_acts = sae.pre_acts(x)
    values, latents = sae.select(pre_acts)
    error = F.embedding_bag(latents, sae.W_dec, per_sample_weights=values, mode="sum") + (sae.b_dec - x)
    fvu = error.square().mean() / variance
    aux = _auxk_term(sae, pre_acts, -error.detach(), dead)
    positive = values.detach() > 0
    return Losses(
        total=fvu + aux,
        fvu=fvu.detach(),
        l0=positive.sum() / len(x),
        aux=aux.detach(),
        fired=fired_latents(latents, positive, sae.d_sae),
    )


def batch_topk_losses(sae: SAE, x: Tensor, dead: Tensor | None, variance: float) -> Losses:
    """Mean squared error over the variance of the inputs, plus AuxK; `topk_losses` but for what a row may keep.

    The threshold takes no part: it is calibrated after training.

    Source: Bussmann et al. 2024, arXiv:2412.06410, section 3; AuxK as Gao et al. 2024.
    """
    sae = cast(BatchTopKSAE, sae)
    pre_acts = sae.pre_acts(x)
    values, rows, latents = sae.select_batch(pre_acts)
    starts = torch.searchsorted(rows, torch.arange(len(x), device=rows.device))
    error = F.embedding_bag(latents, sae.W_dec, starts, per_sample_weights=values, mode="sum") + (sae.b_dec - x)
    fvu = error.square().mean() / variance
    aux = _auxk_term(sae, pre_acts, -error.detach(), dead)
    positive = torch.ones_like(latents, dtype=torch.bool)
    return Losses(
        total=fvu + aux,
        fvu=fvu.detach(),
        l0=positive.sum() / len(x),
        aux=aux.detach(),
        fired=fired_latents(latents, positive, sae.d_sae),
    )


def _auxk_term(sae: TopKSAE | BatchTopKSAE, pre_acts: Tensor, residual: Tensor, dead: Tensor | None) -> Tensor:
    """AuxK times its coefficient; 0 when nothing is dead or it is turned off. residual: detached"""
    if dead is None or sae.config.k_aux == 0:
        return residual.new_zeros(())
    which = dead.nonzero().squeeze(1)
    auxk = auxk_loss(residual, pre_acts[:, which], sae.W_dec[which], sae.config.k_aux)
    return sae.config.auxk_coefficient * auxk


def fired_latents(latents: Tensor, positive: Tensor, d_sae: int) -> Tensor:
    """Which latents are positive somewhere. latents: int64, positive: bool, both [batch, k]. bool [d_sae]"""
    fired = torch.zeros(d_sae, dtype=torch.uint8, device=latents.device)
    return fired.scatter_reduce_(0, latents.flatten(), positive.flatten().to(torch.uint8), "amax").bool()


LOSSES: dict[str, Callable[[SAE, Tensor, Tensor | None, float], Losses]] = {
    "batch_topk": batch_topk_losses,
    "standard": standard_losses,
    "topk": topk_losses,
}
"""(sae, x [batch, d_in], dead latents, variance of x per element) -> losses, by architecture."""
