"""Gradients by hand: what automatic differentiation of `losses.py` gives, in fewer and smaller products.

topk, batch_topk: 2 B d (n + 4 k) instead of 10 B d n FLOPs. Only the encoder's product is dense, and it is made and
selected from tile by tile; decoding and the gradients of both matrices run over the selected pairs (`pairs.py`).

Several devices may share one SAE: each then has some of the latents and some of the rows, and what they must tell each
other within a step is asked of a `Collectives`. Losses and gradients are this device's rows' share of the means over
all rows: their sums over the data axis are left to the caller.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.topk import TopKSAE
from sae.train.backward_standard import standard_gradients
from sae.train.collectives import ALONE, Collectives
from sae.train.losses import Losses, fired_latents
from sae.train.pairs import Pairs, encoder_gradients
from sae.train.selection import select_batch_topk, select_topk, top_k

DENSE_AUXK, DENSE_AUXK_ON_GPU = 8, 40
"""AuxK runs over pairs where more than this times k_aux latents are dead, and over matrices of [batch, dead] below:
products of that size are then faster than gathering k_aux rows."""


@torch.no_grad()
def topk_gradients(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
    *,
    selection: torch.dtype | None = None,
) -> Losses:
    """`topk_losses`, with the gradient of every parameter left in it.

    Args:
        n_rows: of the batch, on all devices; None: x has all of them.
        selection: dtype of the product that decides which latents are selected; None: that of the SAE. The selected
            pre-activations are then computed again, so everything but the choice is as exact as without.
    """
    sae = cast(TopKSAE, sae)
    x_in = x - sae.b_dec
    k = sae.config.k
    values, latents = select_topk(x_in, sae.W_enc, sae.b_enc, min(k, sae.d_sae), selection)
    pairs, values = Pairs.of_rows(values, latents, shared.among_largest_of_row(values, k), sae.d_sae)
    if selection is not None:
        values = _pre_acts(sae, pairs, x_in)
    return _gradients(sae, x, x_in, len(x) if n_rows is None else n_rows, pairs, values, dead, variance, shared)


@torch.no_grad()
def batch_topk_gradients(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
    *,
    selection: torch.dtype | None = None,
) -> Losses:
    """`batch_topk_losses`, with the gradient of every parameter left in it. Arguments: as of `topk_gradients`."""
    sae = cast(BatchTopKSAE, sae)
    x_in = x - sae.b_dec
    n_rows = len(x) if n_rows is None else n_rows
    n = n_rows * sae.config.k
    selected = select_batch_topk(x_in, sae.W_enc, sae.b_enc, n, selection)
    kept = shared.among_largest_of_batch(selected[0], n)
    values, rows, latents = selected if kept is None else (column[kept] for column in selected)
    pairs = Pairs(rows, latents, len(x), sae.d_sae)
    if selection is not None:
        values = _pre_acts(sae, pairs, x_in)
    return _gradients(sae, x, x_in, n_rows, pairs, values, dead, variance, shared)


def _pre_acts(sae: SAE, pairs: Pairs, x_in: Tensor) -> Tensor:
    """Of the pairs alone, in the dtype of the SAE. [pairs]"""
    return pairs.dots(sae.W_enc, x_in).add_(sae.b_enc[pairs.latent])


def _gradients(
    sae: TopKSAE | BatchTopKSAE,
    x: Tensor,
    x_in: Tensor,
    n_rows: int,
    pairs: Pairs,
    pre_acts: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives,
) -> Losses:
    """Loss and gradients of a batch whose pairs are chosen.

    Args:
        x_in: x - b_dec.
        n_rows: of all devices.
        pre_acts: of the pairs.
    """
    positive = pre_acts > 0
    values = pre_acts.relu()
    error = shared.sum_latents(pairs.decode(values, sae.W_dec)).add_(sae.b_dec).sub_(x)
    fvu = error.square().sum() / (n_rows * sae.d_in) / variance
    d_x_hat = error * (2 / (n_rows * sae.d_in * variance))
    d_pre_acts = pairs.dots(sae.W_dec, d_x_hat).mul_(positive)
    sae.W_dec.grad = pairs.sums(values, d_x_hat)
    sae.W_enc.grad = pairs.sums(d_pre_acts, x_in)
    sae.b_enc.grad = pairs.totals(d_pre_acts)
    aux = torch.zeros_like(fvu)
    if dead is not None and sae.config.k_aux > 0:
        aux = _add_auxk(sae, x_in, error.neg_(), dead.nonzero().squeeze(1), n_rows, shared)
    encoder_gradients(sae, d_x_hat.sum(dim=0), shared)
    return Losses(
        total=fvu + aux,
        fvu=fvu,
        l0=shared.sum_latents(positive.sum() / n_rows),
        aux=aux,
        fired=fired_latents(pairs.latent, positive, sae.d_sae),
    )


def _add_auxk(
    sae: TopKSAE | BatchTopKSAE, x_in: Tensor, residual: Tensor, which: Tensor, n_rows: int, shared: Collectives
) -> Tensor:
    """Add the gradients of AuxK, which reach dead latents only. Returns: its term of the loss.

    Args:
        which: numbers of the dead ones among this device's latents; other devices may have more, or none.
        n_rows: of all devices.
    """
    W_enc, b_enc, W_dec = sae.W_enc[which], sae.b_enc[which], sae.W_dec[which]
    n_dead = int(shared.sum_latents(torch.tensor(len(which))))
    k_aux = min(sae.config.k_aux, n_dead)
    n_candidates = min(k_aux, len(which))
    sparse = len(which) > (DENSE_AUXK if x_in.device.type == "cpu" else DENSE_AUXK_ON_GPU) * k_aux
    if sparse:
        values, latents = select_topk(x_in, W_enc, b_enc, n_candidates)
        kept = shared.among_largest_of_row(values, k_aux)
        pairs, values = Pairs.of_rows(values.relu_(), latents, kept, len(which))
        predicted = pairs.decode(values, W_dec)
    else:
        values = F.linear(x_in, W_enc, b_enc).relu_()
        if k_aux < n_dead:
            strongest, latents = top_k(values, n_candidates)
            kept = shared.among_largest_of_row(strongest, k_aux)
            strongest = strongest if kept is None else strongest * kept
            values = torch.zeros_like(values).scatter_(1, latents, strongest)
        predicted = values @ W_dec
    mean = shared.sum_rows(residual.sum(dim=0)).div_(n_rows)
    spread = shared.sum_rows((residual - mean).square().sum()).div_(n_rows * sae.d_in)
    error = shared.sum_latents(predicted).sub_(residual)
    scale = torch.where(spread > 0, sae.config.auxk_coefficient / spread.clamp_min(torch.finfo(x_in.dtype).tiny), 0.0)
    aux = error.square().sum().div_(n_rows * sae.d_in) * scale
    d_predicted = error.mul_(scale * (2 / (n_rows * sae.d_in)))

    positive = values > 0
    if sparse:
        d_values = pairs.dots(W_dec, d_predicted).mul_(positive)
        d_W_dec, d_W_enc = pairs.sums(values, d_predicted), pairs.sums(d_values, x_in)
        d_b_enc = pairs.totals(d_values)
    else:
        d_values = (d_predicted @ W_dec.T).mul_(positive)
        d_W_dec, d_W_enc, d_b_enc = values.T @ d_predicted, d_values.T @ x_in, d_values.sum(dim=0)
    for parameter, gradient in ((sae.W_dec, d_W_dec), (sae.W_enc, d_W_enc), (sae.b_enc, d_b_enc)):
        cast(Tensor, parameter.grad).index_add_(0, which, gradient)
    return aux


_Gradients = Callable[[SAE, Tensor, Tensor | None, float, Collectives, int | None], Losses]

GRADIENTS: dict[str, _Gradients] = {
    "batch_topk": batch_topk_gradients,
    "standard": standard_gradients,
    "topk": topk_gradients,
}
"""By architecture, beside the same losses in `losses.LOSSES`."""

BFLOAT16_SELECTION: dict[str, _Gradients] = {
    "batch_topk": partial(batch_topk_gradients, selection=torch.bfloat16),
    "topk": partial(topk_gradients, selection=torch.bfloat16),
}
"""The architectures that select, and can do so by a product in bfloat16."""
