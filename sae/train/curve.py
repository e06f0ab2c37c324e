"""The training curve: means over the steps between two of its points, as a table."""

import math
from collections.abc import Callable

import pyarrow as pa
import torch
from torch import Tensor

from sae.errors import TrainingError
from sae.train.losses import Losses

CURVE_FILE = "metrics.parquet"
N_POINTS = 150
"""Points over a whole run, about."""
COLUMNS = ("step", "n_tokens", "loss", "fvu", "l0", "aux", "dead", "lr")
"""step, n_tokens: done so far. loss, fvu, l0, aux: means over the steps since the last point; aux is the loss's second
term, its coefficient included. dead: share of the latents that are dead now. lr: of the last step."""


EXPLODED_FVU = 100.0
EXPLODED_RATIO = 10.0
"""The error has exploded when its mean since the last point is both: so many times the data's variance, and the first
point's. Predicting the mean has an FVU of 1; a bad start may be far above it, and comes down."""
WHAT_TO_TRY = (
    'Try a lower learning rate (lr), a longer warmup_fraction, max_grad_norm, or input_scale="rms" if it is "none".'
)


class TrainingCurve:
    """Collects without waiting for the device; reads back only at the points.

    Args:
        describe_batch: what the step of a number, from 1, was trained on, for messages.

    Attributes:
        rows: the points so far, in the order of COLUMNS.
        pending: loss, fvu, l0 and aux of every step since the last point. each [4]
    """

    def __init__(self, n_steps: int, describe_batch: Callable[[int], str] = "batch {}".format) -> None:
        self._n_steps, self._describe_batch = n_steps, describe_batch
        self._every = max(1, n_steps // N_POINTS)
        self.rows: list[tuple[float, ...]] = []
        self.pending: list[Tensor] = []

    def add(self, step: int, n_tokens: int, losses: Losses, dead_share: Callable[[], float], lr: float) -> None:
        """Count the step that just ended; it was number `step`, from 1. dead_share: of all latents, asked at points.

        Raises: TrainingError when a loss since the last point was not finite, or the error has exploded.
        """
        self.pending.append(torch.stack((losses.total, losses.fvu, losses.l0, losses.aux)))
        if step % self._every == 0 or step == self._n_steps:
            self.check_finite(step)
            means = torch.stack(self.pending).double().mean(dim=0).tolist()
            self._check_exploded(step, fvu=means[1])
            self.rows.append((step, n_tokens, *means, dead_share(), lr))
            self.pending.clear()

    def check_finite(self, step: int) -> None:
        """Raises: TrainingError when a loss since the last point was not finite."""
        finite = [math.isfinite(loss) for loss in torch.stack(self.pending)[:, 0].tolist()] if self.pending else []
        if not all(finite):
            bad = step - len(finite) + 1 + finite.index(False)
            raise TrainingError(f"the loss stopped being finite at {self._where(bad)}. {WHAT_TO_TRY}")

    def _check_exploded(self, step: int, fvu: float) -> None:
        first = self.rows[0][COLUMNS.index("fvu")] if self.rows else fvu
        if fvu > EXPLODED_FVU and fvu > EXPLODED_RATIO * first:
            raise TrainingError(
                f"the error has exploded: over the last {len(self.pending)} steps before {self._where(step)} it was "
                f"{fvu:.3g} times the variance of the data, {first:.3g} at the start. {WHAT_TO_TRY}"
            )

    def _where(self, step: int) -> str:
        return f"step {step} of {self._n_steps} ({self._describe_batch(step)})"

    @property
    def last(self) -> dict[str, float]:
        """The last point, by column; empty before the first."""
        return dict(zip(COLUMNS, self.rows[-1], strict=True)) if self.rows else {}

    def table(self) -> pa.Table:
        """All points; columns of COLUMNS, counts as int64 and the rest as float64."""
        columns = dict(zip(COLUMNS, zip(*self.rows, strict=True), strict=True)) if self.rows else {}
        arrays = {}
        for name in COLUMNS:
            values = columns.get(name, ())
            counts = name in ("step", "n_tokens")
            arrays[name] = pa.array(
                [int(v) for v in values] if counts else values, pa.int64() if counts else pa.float64()
            )
        return pa.table(arrays)
