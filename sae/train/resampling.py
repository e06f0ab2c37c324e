"""Dead latents start anew from inputs that are reconstructed badly (Bricken et al. 2023, appendix).

A function of weights, seed and step: nothing to keep in a checkpoint, and a resumed run draws the same inputs.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.architectures.config import Resampling
from sae.architectures.standard import StandardSAE
from sae.philox import philox
from sae.train.collectives import ALONE, Collectives
from sae.train.step import TrainState

logger = logging.getLogger(__name__)

PAPER_EVERY_STEPS = 25_000
PAPER_INPUTS = 819_200
ENCODER_SHARE = 0.2
"""Norm of a new encoder row, in mean norms of those of the alive latents."""
BLOCK_ELEMENTS = 1 << 24
"""Latents held at once: 64 MiB."""


@dataclass(frozen=True)
class ResamplingSchedule:
    """The numbers of a `Resampling` config for a run of a given length."""

    every_steps: int
    n_times: int
    silent_tokens: int
    n_inputs: int

    @classmethod
    def of(cls, config: Resampling, n_steps: int, batch_rows: int) -> Self:
        """What the config leaves open, as its docstrings say."""
        every = config.every_steps or min(PAPER_EVERY_STEPS, max(1, n_steps // 8))
        rows_between = every * batch_rows
        return cls(
            every,
            config.n_times,
            config.silent_tokens or max(1, rows_between // 2),
            config.n_inputs or min(PAPER_INPUTS, max(1, rows_between // 8)),
        )

    def is_due(self, step: int) -> bool:
        """Whether latents are resampled after the step with this number, from 1."""
        return step % self.every_steps == 0 and step // self.every_steps <= self.n_times


@torch.no_grad()
def resample(
    state: TrainState, inputs: Iterable[Tensor], silent_tokens: int, seed: int, shared: Collectives = ALONE
) -> int:
    """Give latents that were silent for `silent_tokens` rows new directions, in place.

    A new latent's decoder row is an input scaled to norm 1, its encoder row the same direction with a fifth of the
    mean norm of the alive latents' encoder rows, its bias zero; Adam forgets what it knew of these rows. The inputs are
    drawn without replacement (no two latents become the same), with probabilities proportional to their squared loss.

    Every device measures all inputs, the losses over all latents, so all draw the same; the silent latents take what is
    drawn in the order of their numbers.

    Args:
        inputs: as the SAE sees them, in batches [rows, d_in].
        seed: together with the step it decides what is drawn.

    Returns: how many latents of all devices were resampled; fewer than are silent only where there are fewer usable
        inputs.
    """
    sae, clock = state.sae, state.clock
    silent = clock.tokens_since_fired >= silent_tokens
    by_device = torch.zeros(shared.n_latent, dtype=torch.int64, device=silent.device)
    by_device[shared.latent_rank] = silent.sum()
    by_device = shared.sum_latents(by_device)
    n_before, n_silent = int(by_device[: shared.latent_rank].sum()), int(by_device.sum())
    if n_silent == 0:
        return 0
    chosen = _draw(cast(StandardSAE, sae), inputs, n_silent, seed, state.step, shared)
    n_chosen = len(chosen)
    chosen = chosen[n_before : n_before + int(silent.sum())]
    which = silent.nonzero().squeeze(1)[: len(chosen)]
    directions = F.normalize(chosen, dim=1)
    norms, n_latents = sae.W_enc.norm(dim=1), len(silent) * shared.n_latent
    norm = _mean(norms[~silent] if n_silent < n_latents else norms, shared)
    sae.W_dec[which] = directions
    sae.W_enc[which] = ENCODER_SHARE * norm * directions
    sae.b_enc[which] = 0
    for parameter in (sae.W_dec, sae.W_enc, sae.b_enc):
        for moment in state.optimizer.state[parameter].values():
            if moment.shape == parameter.shape:
                moment[which] = 0
    clock.tokens_since_fired[which] = 0
    logger.info("step %d: %d of %d silent latents start anew", state.step, n_chosen, n_silent)
    return n_chosen


def _mean(values: Tensor, shared: Collectives) -> Tensor:
    """Of the values of all devices' latents."""
    return shared.sum_latents(values.sum()) / int(shared.sum_latents(torch.tensor(len(values))))


def row_losses(sae: StandardSAE, x: Tensor, shared: Collectives = ALONE) -> Tensor:
    """The loss of every row alone, both terms; their mean is the loss of the batch. [rows, d_in] -> [rows]"""
    latents = sae.encode(x)
    error, mass = (shared.sum_latents(latents @ sae.W_dec) + sae.b_dec - x).square(), latents
    if sae.config.reduction == "mean":
        return error.mean(dim=1) + sae.l1_coefficient * (shared.sum_latents(mass.sum(dim=1)) / sae.config.d_sae)
    if not sae.unit_decoder:
        mass = mass * sae.W_dec.norm(dim=1)
    return error.sum(dim=1) + sae.l1_coefficient * shared.sum_latents(mass.sum(dim=1))


def _draw(
    sae: StandardSAE, inputs: Iterable[Tensor], n: int, seed: int, step: int, shared: Collectives = ALONE
) -> Tensor:
    """At most n rows of a stream, drawn by squared loss without replacement. [n, d_in]

    Every row gets an exponential variable over its weight; the smallest win (Efraimidis and Spirakis 2006). So only
    the n rows that are ahead are held.
    """
    rng = philox("resampling", seed, step)
    block_rows = max(1, BLOCK_ELEMENTS // sae.d_sae)
    times, rows = sae.W_enc.new_empty(0, dtype=torch.float64), sae.W_enc.new_empty(0, sae.d_in)
    for batch in inputs:
        for x in batch.split(block_rows):
            weight = row_losses(sae, x, shared).double().square()
            weight = torch.where(x.any(dim=1), weight, 0)  # an input of zeros has no direction
            time = torch.from_numpy(rng.standard_exponential(len(x))).to(weight) / weight
            usable = weight > 0
            times, rows = torch.cat([times, time[usable]]), torch.cat([rows, x[usable]])
            times, first = times.topk(min(n, len(times)), largest=False)
            rows = rows[first]
    return rows
