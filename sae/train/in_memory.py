"""Train on rows that are already in memory: notebooks, toys, replicates. The same steps as from the store."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sae.architectures import SAE, build_sae
from sae.errors import ConfigError, TrainingError
from sae.philox import philox
from sae.progress import Progress, silent
from sae.train.backward import standard_gradients
from sae.train.config import TrainConfig
from sae.train.init import SAMPLE_ROWS
from sae.train.live import live_note
from sae.train.pretrained import load_initial
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.schedule import count_steps
from sae.train.step import apply_gradients, make_optimizer


def train_in_memory(x: Tensor, config: TrainConfig, *, seed: int | None = None) -> SAE:
    """Train one SAE on the rows of `x`, shuffled anew every epoch; `train_run_in_memory` also gives the curve.

    Args:
        x: [rows, d_in], any float dtype.
        config: `batch_rows` is cut to the number of rows (full batches).
        seed: of the initialisation and of the order, in place of `config.seed`.

    Returns: the SAE, for inputs in the units of `x`.
    Raises: ConfigError when x is not a matrix of floats; TrainingError when it has no variance, or a loss is not
        finite or explodes.
    """
    run = train_run_in_memory(x, config, seed=seed)
    return run.result()


def train_run_in_memory(
    x: Tensor, config: TrainConfig, *, seed: int | None = None, progress: Progress = silent
) -> TrainingRun:
    """Like `train_in_memory`; returns the finished run: `.curve.table()`, `.metrics()`, then `.result()`.

    Args:
        progress: told of every step.
    """
    run = _new_run(x, config, config.seed if seed is None else seed)
    x = x.detach().float()
    n_rows = len(x)
    batch_rows = min(config.batch_rows, n_rows)
    epoch, began = 0, time.perf_counter()
    while not run.finished:
        for batch in [x] if batch_rows == n_rows else _shuffled(x, run.config.seed, epoch, batch_rows):
            run.advance(batch)
            rows_per_second = run.state.n_tokens / max(time.perf_counter() - began, 1e-9)
            progress(run.state.step, run.n_steps, "steps", live_note([run.curve.last], rows_per_second))
            if run.finished:
                break
        epoch += 1
    return run


def train_replicates(x: Tensor, config: TrainConfig, seeds: Sequence[int]) -> list[SAE]:
    """The SAEs of `train_in_memory` for every seed, to rounding.

    Small standard SAEs on full batches cost mostly calls, so theirs are stacked into one; others are trained in turn.
    """
    plain = config.max_grad_norm is None and config.ema_decay is None
    standard = config.sae.architecture == "standard" and not (config.sae.resampling or config.sae.l1_warmup_fraction)
    if not (plain and standard) or config.batch_rows < len(x) or not seeds:
        return [train_in_memory(x, config, seed=seed) for seed in seeds]
    runs = [_new_run(x, config, seed) for seed in seeds]
    first = runs[0]
    stack = build_sae(config.sae, first.d_in)
    for name, _ in list(stack.named_parameters()):
        stacked = torch.stack([run.state.sae.get_parameter(name).detach() for run in runs])
        setattr(stack, name, torch.nn.Parameter(stacked))
    optimizer = make_optimizer(stack, config.adam_betas)
    scaled = x.detach().float() * first.scale
    for step in range(first.n_steps):
        losses = standard_gradients(stack, scaled, None, first.variance)
        apply_gradients(stack, optimizer, first.learning_rate(step))
    if not bool(losses.total.isfinite().all()):
        raise TrainingError("the loss of a replicate stopped being finite. Try a lower learning rate (lr).")
    for i, run in enumerate(runs):
        for name, parameter in run.state.sae.named_parameters():
            parameter.data.copy_(stack.get_parameter(name)[i])
    return [run.result() for run in runs]


def _shuffled(x: Tensor, seed: int, epoch: int, batch_rows: int) -> Iterator[Tensor]:
    order = philox("rows in memory", seed, epoch).permutation(len(x))
    return (x[rows] for rows in torch.from_numpy(order).to(x.device).split(batch_rows))


def _new_run(x: Tensor, config: TrainConfig, seed: int) -> TrainingRun:
    if x.ndim != 2 or not x.is_floating_point() or len(x) < 2:
        raise ConfigError(f"expected floats [rows, d_in] of at least two rows, got {x.dtype} {tuple(x.shape)}")
    config = TrainConfig.model_validate(config.model_dump() | {"seed": seed})
    x = x.detach().float()
    moments = DataMoments.of(x)
    moments.check("the given rows")
    n_rows = len(x)
    n_steps = count_steps(config.n_tokens or n_rows, n_rows, min(config.batch_rows, n_rows))
    sample = x[torch.from_numpy(philox("sample", seed).permutation(n_rows)[:SAMPLE_ROWS])].cpu()
    rows = RowsInMemory(x, config.batch_rows, seed)
    return TrainingRun(config, moments, n_steps, sample, x.device, rows=rows, initial=load_initial(config))
