"""The gradients of the ReLU architecture by hand: five products at first, and one once few latents are positive."""

from typing import cast

import torch
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.standard import StandardSAE
from sae.train.collectives import ALONE, Collectives
from sae.train.losses import Losses
from sae.train.pairs import Pairs, encoder_gradients
from sae.train.selection import iter_pre_acts

SPARSE_BELOW, SPARSE_BELOW_ON_GPU = 0.06, 0.02
"""Share of positive latents in a tile from which on its pairs are faster than products of whole matrices."""


@torch.no_grad()
def standard_gradients(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
) -> Losses:
    """`standard_losses`, with the gradient of every parameter left in it.

    Whether a tile is dense or sparse is decided by its own positive latents, so nothing is remembered between steps.
    Parameters may have a leading dimension, several SAEs stacked: then so have the losses, and all is dense.

    Args:
        n_rows: of the batch, on all devices; None: x has all of them.
    """
    sae = cast(StandardSAE, sae)
    config, d_in, n_rows = sae.config, sae.d_in, len(x) if n_rows is None else n_rows
    stacked = sae.W_enc.ndim > 2
    x_in = x - sae.b_dec.unsqueeze(-2) if sae.subtracts_b_dec else x
    summed = config.reduction == "sum"
    # reduction "sum": all sums are divided by the rows; "mean": by the elements.
    per_latent = sae.l1_coefficient / (n_rows if summed else n_rows * config.d_sae)
    norm = sae.W_dec.norm(dim=-1) if summed and not sae.unit_decoder else None
    penalty = torch.full_like(sae.b_enc, per_latent) if norm is None else per_latent * norm

    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        parameter.grad = torch.zeros_like(parameter)
    d_W_enc, d_W_dec, d_b_enc = (cast(Tensor, p.grad) for p in (sae.W_enc, sae.W_dec, sae.b_enc))
    mass = torch.zeros_like(sae.b_enc)
    n_positive = torch.zeros(mass.shape[:-1], dtype=torch.int64, device=x.device)
    d_x_hat = x.new_empty(*sae.W_enc.shape[:-2], *x.shape)
    sparse_below = SPARSE_BELOW if x.device.type == "cpu" else SPARSE_BELOW_ON_GPU
    sparse: list[tuple[Tensor, ...]] = []
    for rows, pre_acts in iter_pre_acts(x_in, sae.W_enc, sae.b_enc):
        latents = pre_acts.relu_()
        count = latents.count_nonzero(dim=(-2, -1))
        n_positive += count
        out = d_x_hat[..., rows, :]
        if not stacked and int(count) < sparse_below * latents.numel():
            place = latents.view(-1).nonzero().squeeze(1)
            pairs = Pairs(place // sae.d_sae, place % sae.d_sae, len(latents), sae.d_sae)
            values = latents.view(-1)[place]
            _to_d_x_hat(out, shared.sum_latents(pairs.decode(values, sae.W_dec)), sae.b_dec, x[rows], n_rows, summed)
            d_values = pairs.dots(sae.W_dec, out) + penalty[pairs.latent]
            sparse.append((pairs.row + rows.start, pairs.latent, values, d_values))
            continue
        mass += latents.sum(dim=-2)
        _to_d_x_hat(out, shared.sum_latents(latents @ sae.W_dec), sae.b_dec, x[rows], n_rows, summed)
        _add_product(d_W_dec, latents.mT, out)
        d_pre_acts = (out @ sae.W_dec.mT).add_(penalty.unsqueeze(-2)).mul_(latents.sign_())
        _add_product(d_W_enc, d_pre_acts.mT, x_in[..., rows, :])
        d_b_enc += d_pre_acts.sum(dim=-2)
    if sparse:
        row, latent, values, d_values = (torch.cat(column) for column in zip(*sparse, strict=True))
        pairs = Pairs(row, latent, len(x), sae.d_sae)
        d_W_dec += pairs.sums(values, d_x_hat)
        d_W_enc += pairs.sums(d_values, x_in)
        d_b_enc += pairs.totals(d_values)
        mass += pairs.totals(values)

    squared = d_x_hat.square().sum(dim=(-2, -1)).div_(n_rows * d_in)
    mse = squared * (n_rows if summed else n_rows * d_in) ** 2 / 4
    aux = shared.sum_latents((penalty * mass).sum(dim=-1))
    if norm is not None:
        along = per_latent * mass / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        d_W_dec += along.unsqueeze(-1) * sae.W_dec
    encoder_gradients(sae, d_x_hat.sum(dim=-2), shared)
    return Losses(
        total=(mse * d_in if summed else mse) + aux,
        fvu=mse / variance,
        l0=shared.sum_latents(n_positive / n_rows),
        aux=aux,
        fired=mass > 0,
    )


def _to_d_x_hat(out: Tensor, decoded: Tensor, b_dec: Tensor, x: Tensor, n_rows: int, summed: bool) -> None:
    """The derivative of the squared error by the reconstruction of some rows, into `out`."""
    error = decoded.add_(b_dec.unsqueeze(-2)).sub_(x)
    torch.mul(error, 2 / (n_rows if summed else n_rows * x.shape[-1]), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.ndim == 2:
        total.addmm_(a, b)
    else:
        total += a @ b
