"""One optimizer step: gradients, their sum over devices, projection, Adam, renormalisation, dead-latent clock.

How gradients are made is one function (`Gradients`): the hand-written ones are used, automatic differentiation is what
they must equal. From the sum on, every device works on its own latents alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sae.architectures import SAE
from sae.train.backward import BFLOAT16_SELECTION, GRADIENTS
from sae.train.collectives import ALONE, Collectives
from sae.train.dead_latents import DeadLatentClock
from sae.train.losses import LOSSES, Losses
from sae.train.products import ProductLibrary, products_by
from sae.train.shares import LATENT_PARAMETERS

ADAM_EPS = 6.25e-10
"""Gao et al. 2024: gradients of rare latents are small, and the usual 1e-8 would slow them down."""

Gradients = Callable[[SAE, Tensor, Tensor | None, float, Collectives, int | None], Losses]
"""(sae, x [batch, d_in], dead latents or None, variance of x, devices, rows of all of them or None) -> losses; leaves
every parameter its gradient.

x and sae are this device's rows and latents, the losses and gradients its rows' share of the means over all rows.
Without a number of rows x has all of them."""


@dataclass
class TrainState:
    """What a step changes: of the latents that this device has."""

    sae: SAE
    optimizer: torch.optim.Adam
    clock: DeadLatentClock
    products: ProductLibrary = "blas"
    """What makes the products; the same in every step."""
    step: int = 0
    """Steps done."""
    n_tokens: int = 0
    """Rows consumed, by all devices."""


def make_optimizer(sae: SAE, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam over the four tensors; the learning rate is set at every step."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=betas, eps=ADAM_EPS, fused=True)


def fast_gradients(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
) -> Losses:
    """The losses of a batch, and their gradients as written by hand for the architecture."""
    return GRADIENTS[sae.config.architecture](sae, x, dead, variance, shared, n_rows)


def fast_gradients_selecting_in_bfloat16(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
) -> Losses:
    """`fast_gradients`, but the product that decides which latents are selected is made in bfloat16."""
    return BFLOAT16_SELECTION[sae.config.architecture](sae, x, dead, variance, shared, n_rows)


def autograd_gradients(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None,
    variance: float,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
) -> Losses:
    """The losses of a batch, and their gradients by automatic differentiation: the reference, on one device."""
    sae.zero_grad(set_to_none=True)
    losses = LOSSES[sae.config.architecture](sae, x, dead, variance)
    losses.total.backward()
    return losses._replace(total=losses.total.detach())


def train_step(
    state: TrainState,
    x: Tensor,
    lr: float,
    variance: float,
    gradients: Gradients = fast_gradients,
    max_grad_norm: float | None = None,
    shared: Collectives = ALONE,
    n_rows: int | None = None,
) -> Losses:
    """Train on one batch.

    Args:
        x: this device's rows, as the SAE sees them. [batch, d_in]
        variance: of x per element, over all the data.
        n_rows: of the batch, on all devices; None: x has all of them.

    Returns: the losses of all rows. On a mesh `fired` is of this device's latents.
    """
    sae, clock, n_rows = state.sae, state.clock, len(x) if n_rows is None else n_rows
    with products_by(state.products):
        losses = gradients(sae, x, clock.dead_or_none(shared), variance, shared, n_rows)
    losses = sum_over_rows(sae, losses, shared)
    apply_gradients(sae, state.optimizer, lr, max_grad_norm, shared)
    clock.update(losses.fired, n_rows)
    state.step += 1
    state.n_tokens += n_rows
    return losses


def sum_over_rows(sae: SAE, losses: Losses, shared: Collectives) -> Losses:
    """Losses and gradients of all rows, from those of this device's rows."""
    for parameter in sae.parameters():
        if parameter.grad is not None:
            parameter.grad = shared.sum_rows(parameter.grad)
    total, fvu, l0, aux = shared.sum_rows(torch.stack([losses.total, losses.fvu, losses.l0, losses.aux])).unbind()
    return Losses(total, fvu, l0, aux, fired=shared.any_rows(losses.fired))


def apply_gradients(
    sae: SAE,
    optimizer: torch.optim.Adam,
    lr: float,
    max_grad_norm: float | None = None,
    shared: Collectives = ALONE,
) -> None:
    """Projection, clipping, Adam, renormalisation: in this order.

    What the projection takes away does not count in the norm that is clipped, and the rows of a unit decoder end with
    norm 1.
    """
    if sae.unit_decoder:
        remove_parallel_component(sae.W_dec)
    if max_grad_norm is not None:
        clip_gradient(sae, max_grad_norm, shared)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if sae.unit_decoder:
        renormalise(sae.W_dec)


@torch.no_grad()
def clip_gradient(sae: SAE, max_norm: float, shared: Collectives) -> None:
    """Scale the gradient down to `max_norm`, the norm over all parameters together, where it is longer."""
    norms = torch.stack([torch.linalg.vector_norm(cast(Tensor, p.grad)) for p in sae.parameters()])
    of_latents = [name in LATENT_PARAMETERS for name, _ in sae.named_parameters()]
    norms[of_latents] = shared.norm_latents(norms[of_latents])
    torch.nn.utils.clip_grads_with_norm_(sae.parameters(), max_norm, torch.linalg.vector_norm(norms))


@torch.no_grad()
def remove_parallel_component(W_dec: Tensor) -> None:
    """Take from the gradient of each unit row its component along the row, before Adam sees it.

    Renormalisation would undo that component, but Adam's moments would have been scaled by it (Bricken et al. 2023).
    """
    if W_dec.grad is not None:
        along = torch.linalg.vecdot(W_dec.grad, W_dec)
        W_dec.grad.addcmul_(along.unsqueeze(-1), W_dec, value=-1)


@torch.no_grad()
def renormalise(W_dec: Tensor) -> None:
    """Give each row norm 1, in place."""
    norm = torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True)
    W_dec.div_(norm.clamp_min_(torch.finfo(W_dec.dtype).tiny))
