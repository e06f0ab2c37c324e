"""A training step on a GPU: against automatic differentiation there, in a mesh of one over NCCL, and on the CPU."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sae.architectures.config import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.device import count_gpus, prepare, wait_for
from sae.train.collectives import ALONE, Collectives
from sae.train.config import TrainConfig
from sae.train.mesh import Mesh, MeshConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from sae.train.step import autograd_gradients, train_step
from tests.benchmarks.timing import Row, compare
from tests.sae.train.ranks import environment

BATCH_ROWS, D_IN, D_SAE, K = 8192, 1024, 16_384, 32
STEPS = 20
"""At a time: one alone is soon over, and is launched rather than computed."""
BACKEND = "cpu:gloo,cuda:nccl"


def gpu(folder: Path) -> Iterator[Row | str]:
    """Rows/s of a step, projection, Adam and renormalisation included."""
    if not count_gpus():
        yield "gpu: there is none here"
        return
    device = torch.device("cuda", 0)
    prepare(device)
    yield torch.cuda.get_device_name(device)
    configs: dict[str, tuple[SAEConfig, str]] = {
        "topk": (TopKConfig(d_sae=D_SAE, k=K), "float32"),
        "topk, selection in bfloat16": (TopKConfig(d_sae=D_SAE, k=K), "bfloat16"),
        "batch_topk": (BatchTopKConfig(d_sae=D_SAE, k=K), "float32"),
        "batch_topk, selection in bfloat16": (BatchTopKConfig(d_sae=D_SAE, k=K), "bfloat16"),
        "standard": (StandardConfig(d_sae=D_SAE, l1_coefficient=1e-3), "float32"),
    }
    os.environ |= environment(world=1) | {"RANK": "0"}
    dist.init_process_group(BACKEND)
    try:
        mesh = Mesh(MeshConfig(), timedelta(seconds=60))
        for name, (config, selection) in configs.items():
            x = torch.randn(BATCH_ROWS, D_IN, generator=torch.Generator().manual_seed(0)).to(device)
            new_run = partial(_run, x, config, selection)
            yield _against(f"{name} / autograd (d_sae {D_SAE})", _advance(new_run(), x), _autograd(new_run(), x))
            yield _against(f"{name}: in a mesh of one / without", _advance(new_run(mesh), x), _advance(new_run(), x))
            host = _advance(_run(x.cpu(), config, selection), x.cpu())
            yield compare(f"{name}: GPU / CPU", partial(_times, 1, _advance(new_run(), x)), host, BATCH_ROWS, "rows")
    finally:
        dist.destroy_process_group()


def _run(x: Tensor, config: SAEConfig, selection: str, shared: Collectives = ALONE) -> TrainingRun:
    train = TrainConfig.model_validate({"sae": config, "selection": selection})
    rows = RowsInMemory(x, BATCH_ROWS, 0)
    return TrainingRun(train, DataMoments.of(x), n_steps=100_000, device=x.device, rows=rows, shared=shared)


def _advance(run: TrainingRun, x: Tensor) -> Callable[[], object]:
    return partial(run.advance, x)


def _autograd(run: TrainingRun, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        train_step(run.state, x * run.scale, run.learning_rate(run.state.step), run.variance, autograd_gradients)

    return step


def _against(what: str, ours: Callable[[], object], reference: Callable[[], object]) -> Row:
    mine, theirs = (partial(_times, STEPS, step) for step in (ours, reference))
    return compare(what, mine, theirs, STEPS * BATCH_ROWS, "rows")


def _times(n: int, step: Callable[[], object]) -> None:
    for _ in range(n):
        step()
    wait_for("cuda")
