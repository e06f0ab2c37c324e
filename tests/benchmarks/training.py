"""Our training step against the same step by automatic differentiation: speed in turn, peak memory in processes."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sae.architectures.config import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step import autograd_gradients, train_step
from tests.benchmarks.timing import Row, compare, resident_bytes

BATCH_ROWS, D_IN, K = 4096, 512, 32
SPARSE_BIAS = -1.1
"""Of every latent: about 60 of 4096 are then positive in a row, as late in training."""


def training(folder: Path) -> Iterator[Row]:
    """Rows/s of a step, projection, Adam and renormalisation included; then the peak memory of a process with one."""
    for d_sae in (4096, 16384):
        configs: dict[str, tuple[SAEConfig, str, float]] = {
            "topk": (TopKConfig(d_sae=d_sae, k=K), "float32", 0),
            "topk, selection in bfloat16": (TopKConfig(d_sae=d_sae, k=K), "bfloat16", 0),
            "batch_topk": (BatchTopKConfig(d_sae=d_sae, k=K), "float32", 0),
            "batch_topk, selection in bfloat16": (BatchTopKConfig(d_sae=d_sae, k=K), "bfloat16", 0),
            "standard, half positive": (StandardConfig(d_sae=d_sae, l1_coefficient=1e-3), "float32", 0),
            "standard, few positive": (StandardConfig(d_sae=d_sae, l1_coefficient=1e-3), "float32", SPARSE_BIAS),
        }
        for name, (config, selection, bias) in configs.items():
            yield _speed(f"{name} / autograd (d_sae {d_sae})", config, selection, bias)
    for d_sae in (16384, 65536):
        for architecture in ("topk", "batch_topk", "standard"):
            fast, dense = (_peak_in_a_process(architecture, d_sae, how) for how in ("fast", "autograd"))
            yield Row(
                f"{architecture}: peak memory, autograd over fast (d_sae {d_sae})",
                f"{fast / 1e6:,.0f} MB",
                f"{dense / 1e6:,.0f} MB",
                (dense / fast,),
            )


def _speed(what: str, config: SAEConfig, selection: str, bias: float) -> Row:
    x = _rows()
    ours, reference = (_run(x, config, selection, bias) for _ in range(2))
    return compare(
        what,
        functools.partial(ours.advance, x),
        functools.partial(_autograd_step, reference, x),
        len(x),
        "rows",
        n_pairs=3,
    )


def _rows() -> Tensor:
    return torch.randn(BATCH_ROWS, D_IN, generator=torch.Generator().manual_seed(0))


def _run(x: Tensor, config: SAEConfig, selection: str, bias: float) -> TrainingRun:
    train = TrainConfig.model_validate({"sae": config, "selection": selection})
    run = TrainingRun(train, DataMoments.of(x), n_steps=100_000, rows=RowsInMemory(x, BATCH_ROWS, 0))
    run.state.sae.b_enc.data.fill_(bias)
    return run


def _autograd_step(run: TrainingRun, x: Tensor) -> None:
    """Products by the library that torch takes by itself."""
    run.state.products = "blas"
    train_step(run.state, x * run.scale, run.learning_rate(run.state.step), run.variance, autograd_gradients)


def _peak_in_a_process(architecture: str, d_sae: int, how: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.training", architecture, str(d_sae), how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak(architecture: str, d_sae: int, how: str) -> int:
    """Bytes, at most, of this process after two steps; libraries, weights and Adam's moments included."""
    configs: dict[str, SAEConfig] = {
        "topk": TopKConfig(d_sae=d_sae, k=K),
        "batch_topk": BatchTopKConfig(d_sae=d_sae, k=K),
        "standard": StandardConfig(d_sae=d_sae, l1_coefficient=1e-3),
    }
    x = _rows()
    run = _run(x, configs[architecture], "float32", 0)
    for _ in range(2):
        if how == "fast":
            run.advance(x)
        else:
            _autograd_step(run, x)
    return resident_bytes("VmHWM")


if __name__ == "__main__":
    print(_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
