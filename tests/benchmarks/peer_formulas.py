"""The measures by their definitions, in float64, and what other libraries compute instead, restated.

A measure is one number whatever the batches. That a restated formula gives the peer's number shows that nothing else
differs. Nothing here is shared with `sae.metrics`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures import SAE
from sae.subject.hooks import splice


@dataclass(frozen=True)
class Rows:
    """Rows and what an SAE makes of them, in float64."""

    x: Tensor
    """[rows, d_in]"""
    latents: Tensor
    """[rows, d_sae]"""
    x_hat: Tensor

    @classmethod
    def of(cls, sae: SAE, x: Tensor, k: int) -> "Rows":
        """Encode and decode by the definition of a TopK SAE."""
        x = x.double()
        W_enc, W_dec, b_enc, b_dec = (p.detach().double() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
        pre_acts = (x - b_dec) @ W_enc.T + b_enc
        kept = pre_acts.topk(k, dim=1).indices
        latents = torch.zeros_like(pre_acts).scatter(1, kept, pre_acts.gather(1, kept).relu())
        return cls(x, latents, latents @ W_dec + b_dec)

    @cached_property
    def error(self) -> Tensor:
        """||x - x_hat||^2 of every row."""
        return (self.x - self.x_hat).square().sum(dim=1)

    def split(self, sizes: list[int]) -> list["Rows"]:
        """The rows of each batch."""
        pieces = (self.x.split(sizes), self.latents.split(sizes), self.x_hat.split(sizes))
        return [Rows(*batch) for batch in zip(*pieces, strict=True)]


# What the measures are.


def fvu(rows: Rows) -> float:
    return float(rows.error.sum() / (rows.x - rows.x.mean(dim=0)).square().sum())


def l0(rows: Rows) -> float:
    return float((rows.latents > 0).sum(dim=1).double().mean())


def frequency(rows: Rows) -> Tensor:
    return (rows.latents > 0).double().mean(dim=0)


def dead_fraction(rows: Rows) -> float:
    return float((frequency(rows) == 0).double().mean())


def squared_error(rows: Rows) -> float:
    return float(rows.error.mean())


def norm_ratio(rows: Rows) -> float:
    return float(rows.x_hat.norm(dim=1).sum() / rows.x.norm(dim=1).sum())


def cosine(rows: Rows) -> float:
    return float(F.cosine_similarity(rows.x, rows.x_hat, dim=1).mean())


def relative_bias(rows: Rows) -> float:
    """sum ||x_hat||^2 / sum x . x_hat (Rajamanoharan et al. 2024, arXiv:2404.16014, equation 10)."""
    return float(rows.x_hat.square().sum() / (rows.x * rows.x_hat).sum())


def mean_max_cosine(W_dec: Tensor) -> float:
    """Mean over decoder rows of the largest cosine to another row."""
    cosines = F.normalize(W_dec.double(), dim=1) @ F.normalize(W_dec.double(), dim=1).T
    return float(cosines.fill_diagonal_(-1).amax(dim=1).mean())


def encoder_decoder_cosine(W_enc: Tensor, W_dec: Tensor) -> float:
    return float(F.cosine_similarity(W_enc.double(), W_dec.double(), dim=1).mean())


# What peers compute instead.


def centred_fvu(rows: Rows) -> float:
    """var(x - x_hat) / var(x): a constant error cancels."""
    return float((rows.x - rows.x_hat).var(dim=0).sum() / rows.x.var(dim=0).sum())


def mean_of_norm_ratios(rows: Rows) -> float:
    """The mean over tokens of ||x_hat|| / ||x||: short rows count as much as long ones."""
    return float((rows.x_hat.norm(dim=1) / rows.x.norm(dim=1)).mean())


def mean_of_batches(measure: Callable[[Rows], float], rows: Rows, sizes: list[int]) -> float:
    """The mean of the batches' own figures: a short batch counts as much as a full one."""
    values = [measure(batch) for batch in rows.split(sizes)]
    return sum(values) / len(values)


def mean_of_token_ratios(rows: Rows, sizes: list[int]) -> float:
    """The mean over tokens of ||x - x_hat||^2 / ||x - mean of the batch||^2."""
    ratios = [batch.error / (batch.x - batch.x.mean(dim=0)).square().sum(dim=1) for batch in rows.split(sizes)]
    return float(torch.cat(ratios).mean())


def squared_mean_of_squares_fvu(rows: Rows, sizes: list[int]) -> float:
    """E||x - x_hat||^2 / (E||x||^2 - m^2), m = E[x_i^2] over rows and dimensions: the mean of squares, squared."""
    batches = rows.split(sizes)
    error = torch.stack([batch.error.mean() for batch in batches]).mean()
    norm = torch.stack([batch.x.square().sum(dim=1).mean() for batch in batches]).mean()
    m = torch.cat([batch.x.square().mean(dim=0) for batch in batches]).mean()
    return float(error / (norm - m**2))


def error_over_batch_rows(rows: Rows, sizes: list[int]) -> float:
    """The mean over tokens of ||x - x_hat||^2 / rows of the batch: divided by the number of rows twice."""
    return float(torch.cat([batch.error / len(batch.x) for batch in rows.split(sizes)]).mean())


def float32_variance_fvu(x: Tensor, x_hat: Tensor, sizes: list[int]) -> float:
    """E||x - x_hat||^2 / (E||x||^2 - ||E x||^2), every batch's sums in float32: the difference cancels digits."""
    batches = list(zip(x.split(sizes), x_hat.split(sizes), strict=True))
    squares = sum(float(a.square().sum()) for a, _ in batches)
    error = sum(float((a - b).square().sum()) for a, b in batches)
    mean = torch.stack([a.sum(dim=0).double() for a, _ in batches]).sum(dim=0) / len(x)
    return error / len(x) / (squares / len(x) - float(mean.square().sum()))


# Next-token losses and KL.

VARIANTS = ("clean", "sae", "zero")


@torch.no_grad()
def variant_logits(model: Any, hook_point: str, sae: SAE, tokens: Tensor, replaced: Tensor) -> dict[str, Tensor]:
    """Logits of the untouched model and with the reconstruction, or zero, at the positions of `replaced`.

    Args:
        model, sae: in float64.
        tokens: [contexts, T]
        replaced: bool [contexts, T]
    """

    def run() -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    logits = {"clean": run()}
    for variant, replace in (("sae", sae), ("zero", torch.zeros_like)):
        with splice(
            model, hook_point, lambda act, replace=replace: torch.where(replaced[..., None], replace(act), act)
        ):
            logits[variant] = run()
    return logits


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Loss of every token but the first. [contexts, T - 1]"""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def recovered(clean: float, spliced: float, ablated: float) -> float:
    return (ablated - spliced) / (ablated - clean)


def token_kl(clean: Tensor, other: Tensor) -> Tensor:
    """KL(clean || other) of the next-token distributions at every position. [contexts, T]"""
    clean, other = clean.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return (clean.exp() * (clean - other)).sum(dim=-1)
