"""One SAE in training: its config, weights, schedule and curve, wherever its batches come from."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.batch_topk import BatchTopKSAE
from sae.architectures.standard import StandardSAE
from sae.errors import ConfigError, TrainingError
from sae.train.averaging import WeightAverage
from sae.train.collectives import ALONE, Collectives
from sae.train.config import Pretrained, TrainConfig
from sae.train.curve import WHAT_TO_TRY, TrainingCurve
from sae.train.dead_latents import DeadLatentClock, wake
from sae.train.init import initialise, needs_sample
from sae.train.pretrained import start_from
from sae.train.products import probe_library
from sae.train.resampling import ResamplingSchedule, resample
from sae.train.rows import RowSource
from sae.train.schedule import batch_of, learning_rate, waking_rate, warmed_up
from sae.train.shares import build_share
from sae.train.step import (
    TrainState,
    fast_gradients,
    fast_gradients_selecting_in_bfloat16,
    make_optimizer,
    train_step,
)
from sae.train.threshold import Calibration, calibrate
from sae.weights import fold_decoder_norm, fold_input_scale

logger = logging.getLogger(__name__)

MOMENTS_ROWS = 16_384
"""Rows whose moments are taken at once."""


@dataclass(frozen=True)
class DataMoments:
    """What training must know of the data before it starts."""

    mean: Tensor
    """float64 [d_in]"""
    mean_sq_norm: float
    """E ||x - mean||^2"""
    n_rows: int

    @classmethod
    def of(cls, x: Tensor) -> "DataMoments":
        """Of rows in memory [rows, d_in], block by block: a copy of all in float64 may not fit."""
        blocks = x.split(MOMENTS_ROWS)
        mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(x)
        squares = torch.stack([(block.double() - mean).square().sum() for block in blocks]).sum()
        return cls(mean, float(squares) / len(x), len(x))

    @property
    def rms(self) -> float:
        """Root mean square of an element about its mean."""
        return math.sqrt(self.mean_sq_norm / len(self.mean))

    def check(self, name: str) -> None:
        """Raises: TrainingError when the data has no variance, or NaN."""
        if not (math.isfinite(self.mean_sq_norm) and bool(self.mean.isfinite().all())):
            raise TrainingError(f"{name}: the data holds values that are not finite")
        # Rounding of float32 values leaves about this much where all rows are equal.
        if self.mean_sq_norm <= 1e-12 * max(float(self.mean.square().sum()), 1e-30):
            raise TrainingError(
                f"{name}: the data has no variance: its {self.n_rows} rows are all equal. "
                f"Check the hook point and the source of the activations."
            )


def _input_scale(name: str, moments: DataMoments, sample: Tensor | None) -> float:
    if name == "rms":
        return 1 / moments.rms
    if name == "none":
        return 1.0
    if sample is None:
        raise ValueError(f"input_scale {name!r} needs a sample of the data")
    return math.sqrt(sample.shape[1]) / float(sample.double().norm(dim=1).mean())


class TrainingRun:
    """Trains one SAE on the batches it is given, and stops by itself after `n_steps`.

    Several devices may train it together: each has a run of its own, with its latents, and is given its rows.

    Args:
        moments: of all the data, in its own units.
        n_steps: optimizer steps in all.
        sample: rows of the data [rows, d_in], for configs that look at it (`TrainingRun.wants_sample`).
        rows: where a threshold finds rows to be calibrated on, and resampling those to draw from.
        initial: the SAE whose weights it starts from (`pretrained.load_initial`).
        name: of the SAE, for warnings.
        shared: the devices that train it.

    Raises: ConfigError when `initial` has other sizes, or the devices cannot share the latents evenly.
    """

    def __init__(
        self,
        config: TrainConfig,
        moments: DataMoments,
        n_steps: int,
        sample: Tensor | None = None,
        device: torch.device | str = "cpu",
        *,
        rows: RowSource,
        initial: SAE | None = None,
        name: str = "the SAE",
        shared: Collectives = ALONE,
    ) -> None:
        self.shared = shared
        self.config, self.n_steps, self.device, self.name = config, n_steps, torch.device(device), name
        self.peak_lr = config.peak_lr(n_steps * config.batch_rows)
        self.d_in = len(moments.mean)
        self.scale = _input_scale(config.input_scale, moments, sample)
        """The SAE sees scale * x."""
        self.variance = moments.mean_sq_norm / self.d_in * self.scale**2
        sae = build_share(config.sae, self.d_in, shared)
        if isinstance(config.init, Pretrained):
            if initial is None:
                raise ValueError("init.weights needs the SAE that they are taken from")
            start_from(sae, initial, self.scale, config.init.weights, shared)
        else:
            initialise(
                sae,
                config.init,
                config.seed,
                mean=(moments.mean.cpu() * self.scale).float(),
                sample=None if sample is None else sample * self.scale,
                shared=shared,
            )
        sae.to(self.device)
        clock = DeadLatentClock(sae.d_sae, config.auxk_after_tokens, self.device)
        slow = shared.agree(probe_library(self.device) == "blas")  # on any machine of several
        self.state = TrainState(sae, make_optimizer(sae, config.adam_betas), clock, "blas" if slow else "onednn")
        in_bfloat16 = config.selection == "bfloat16"
        self._gradients = fast_gradients_selecting_in_bfloat16 if in_bfloat16 else fast_gradients
        self._rows = rows
        resampling = config.sae.resampling if config.sae.architecture == "standard" else None
        self._resampling = ResamplingSchedule.of(resampling, n_steps, config.batch_rows) if resampling else None
        self._calibration: Calibration | None = None
        self.average = WeightAverage(sae, config.ema_decay) if config.ema_decay is not None else None
        self.curve = TrainingCurve(n_steps, self._describe_batch)
        self._n_rows = moments.n_rows
        self._told_of_dead = False

    @staticmethod
    def wants_sample(config: TrainConfig) -> bool:
        """Whether the config's initialisation or input scale looks at rows of the data."""
        needed = not isinstance(config.init, Pretrained) and needs_sample(config.init)
        return needed or config.input_scale == "sqrt_d"

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.n_steps

    def learning_rate(self, step: int) -> float:
        """Of step 0 <= step < n_steps."""
        return learning_rate(step, *self._schedule)

    @property
    def _schedule(self) -> tuple[int, float, float, float]:
        return self.n_steps, self.peak_lr, self.config.warmup_fraction, self.config.decay_fraction

    def advance(self, x: Tensor, n_rows: int | None = None) -> None:
        """Train on one batch, or this device's rows of it, in the data's own units.

        Args:
            x: [rows, d_in]
            n_rows: of the batch, on all devices; None: x has all of them.

        Raises:
            ConfigError: the batch has another width.
            TrainingError: a loss was not finite, or has exploded (noticed at the next point of the curve).
        """
        if x.shape[1] != self.d_in:
            raise ConfigError(
                f"a batch of width {x.shape[1]} for an SAE of d_in = {self.d_in}. It was made for other activations."
            )
        config, state = self.config, self.state
        step, lr = state.step, self.learning_rate(state.step)
        if isinstance(state.sae, StandardSAE):
            standard = state.sae.config
            state.sae.l1_coefficient = warmed_up(
                state.step, self.n_steps, standard.l1_coefficient, standard.l1_warmup_fraction
            )
        x = x.to(self.device) * self.scale
        losses = train_step(state, x, lr, self.variance, self._gradients, config.max_grad_norm, self.shared, n_rows)
        if config.sae.architecture != "standard" and config.sae.wake_rate > 0:
            rise = config.sae.wake_rate * waking_rate(step, *self._schedule)
            wake(state.sae.b_enc, state.clock, config.dead_after_tokens, rise)
        if self.average is not None:
            self.average.update(state.sae, state.step)
        n_points = len(self.curve.rows)
        self.curve.add(state.step, state.n_tokens, losses, self._dead_share, lr)
        if len(self.curve.rows) > n_points:
            self._warn_if_all_dead()
        if self._resampling and self._resampling.is_due(state.step) and not self.finished:
            self._resample(self._resampling)

    def check_finite(self) -> None:
        """Raises: TrainingError when a loss since the last point of the curve, or a weight, is not finite."""
        self.curve.check_finite(self.state.step)
        for name, parameter in self.state.sae.named_parameters():
            if self.shared.agree(not bool(parameter.isfinite().all())):
                step = self.state.step
                raise TrainingError(
                    f"{name} holds values that are not finite after step {step} of {self.n_steps} "
                    f"({self._describe_batch(step)}). {WHAT_TO_TRY}"
                )

    def _dead_share(self) -> float:
        return self.state.clock.silent_share(self.config.dead_after_tokens, self.shared)

    def _resample(self, schedule: ResamplingSchedule) -> None:
        state = self.state
        inputs = self._rows.training(schedule.n_inputs, f"resampling {state.step}").batches
        scaled = (batch.to(self.device) * self.scale for batch in inputs)
        silent = state.clock.tokens_since_fired >= schedule.silent_tokens
        resample(state, scaled, schedule.silent_tokens, self.config.seed, self.shared)
        if self.average is not None:
            self.average.restart(state.sae, silent & (state.clock.tokens_since_fired == 0))

    def _describe_batch(self, step: int) -> str:
        epoch, batch = batch_of(step - 1, self._n_rows, self.config.batch_rows)
        first = batch * self.config.batch_rows
        last = min(first + self.config.batch_rows, self._n_rows) - 1
        return f"batch {batch} of epoch {epoch}: rows {first:,} to {last:,} of its order"

    def _warn_if_all_dead(self) -> None:
        if self.curve.last["dead"] == 1 and not self._told_of_dead:
            self._told_of_dead = True
            logger.warning(
                "%s: at step %d of %d all %d latents are dead: none has fired for %s tokens. %s",
                self.name,
                self.state.step,
                self.n_steps,
                self.config.sae.d_sae,
                f"{self.config.dead_after_tokens:,}",
                "Lower lr or, if there is one, l1_coefficient.",
            )

    def result(self) -> SAE:
        """The SAE for the data's own units, or this device's share of it; ends the run.

        A free decoder's norms are folded into the encoder, and a threshold is calibrated.
        """
        sae = self.state.sae.requires_grad_(False)
        if self.average is not None:
            self.average.copy_to(sae)
        if not sae.unit_decoder:
            fold_decoder_norm(sae)
        fold_input_scale(sae, self.scale)
        if isinstance(sae, BatchTopKSAE):
            self._calibration = calibrate(sae, self._rows, shared=self.shared)
        return sae.cpu()

    def metrics(self) -> dict[str, Any]:
        """Sizes and final figures: means over the last stretch of the curve; how a threshold was calibrated, once
        there is a `result`."""
        last = self.curve.last
        return {
            "d_in": self.d_in,
            "d_sae": self.config.sae.d_sae,
            "n_steps": self.state.step,
            "n_tokens": self.state.n_tokens,
            "peak_lr": self.peak_lr,
            "input_scale": self.scale,
            "products": self.state.products,
            **{name: last[name] for name in ("loss", "fvu", "l0", "dead")},
            **(self._calibration.metrics() if self._calibration else {}),
        }
