"""Curves of running SAEs in TensorBoard and Weights & Biases, for those who ask for them. They decide no result."""

import contextlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from sae.errors import ConfigError
from sae.train.config import SAESpec, TensorBoardLog, TrainingLog, WandbLog
from sae.train.curve import COLUMNS, TrainingCurve

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Where the points of one SAE go."""

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Write one point of the curve."""

    def close(self) -> None:
        """Write what is held back, and end."""


def check_logs(logs: Sequence[TrainingLog]) -> None:
    """Raises: ConfigError when the package that one needs is not installed."""
    for index, log in enumerate(logs):
        found = importlib.util.find_spec(log.kind)
        # Without an origin it is a mere folder of that name, such as the one that its runs are written to.
        if found is None or found.origin is None:
            raise ConfigError(
                f"execution.training_logs.{index}: {log.kind} is not installed. Run "
                f"pip install 'sae-pipeline[{log.kind}]', or leave it out."
            )


class CurveLogs:
    """Writes the curve of one SAE, point by point, to every log that was asked for.

    A log that fails is given up with a warning: it must not end the training that it shows.

    Args:
        curve: as it is when training begins or goes on. What it holds was written by an earlier call; what that call
            wrote of later steps is replaced (TensorBoard) or kept (W&B): the values are the same.
    """

    def __init__(self, logs: Sequence[TrainingLog], spec: SAESpec, curve: TrainingCurve) -> None:
        self._spec, self._curve, self._n_written = spec, curve, len(curve.rows)
        first = int(curve.last.get("step", 0)) + 1
        self._writers: list[tuple[str, Writer]] = []
        for log in logs:
            with self._giving_up(log.kind):
                self._writers.append((log.kind, _OPENERS[log.kind](log, spec, first)))

    def write(self) -> None:
        """Write the points that are new."""
        if not self._writers:
            return
        for row in self._curve.rows[self._n_written :]:
            point = dict(zip(COLUMNS, row, strict=True))
            step = int(point.pop("step"))
            for entry in list(self._writers):
                self._writers.remove(entry)
                with self._giving_up(entry[0]):
                    entry[1].add(step, point)
                    self._writers.append(entry)
        self._n_written = len(self._curve.rows)

    def close(self) -> None:
        """Write what is held back, and end."""
        while self._writers:
            kind, writer = self._writers.pop()
            with self._giving_up(kind):
                writer.close()

    @contextlib.contextmanager
    def _giving_up(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # whatever a log's own library raises
            logger.warning("%s: its %s log is given up, training goes on: %r", self._spec.ref, kind, err)


class _TensorBoard:
    """Event files in `<folder>/<name>`."""

    def __init__(self, log: TensorBoardLog, spec: SAESpec, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"{log.folder}/{_run_name(spec)}", purge_step=first_step)
        self._writer.add_text("config", f"```json\n{_config_text(spec)}\n```", global_step=first_step)

    def add(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project, with the SAE's fingerprint as its id: a resumed training goes on in it."""

    def __init__(self, log: WandbLog, spec: SAESpec, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=log.project,
            id=spec.fingerprint,
            name=_run_name(spec),
            config=json.loads(_config_text(spec)),
            resume="allow",
            reinit="create_new",
        )

    def add(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish(quiet=True)


_OPENERS: dict[str, Callable[..., Writer]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _run_name(spec: SAESpec) -> str:
    sae = spec.config.sae
    return f"{sae.architecture}-{sae.d_sae}-{spec.fingerprint}"


def _config_text(spec: SAESpec) -> str:
    return json.dumps({"ref": spec.ref, **spec.model_dump(mode="json")}, indent=1)
