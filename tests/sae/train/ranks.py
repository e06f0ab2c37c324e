"""Processes that form a mesh: each calls the same function and hands back named tensors.

    for tensors in run_ranks(2, mesh_steps.all_cases, tmp_path): ...

Starting a process costs seconds (it loads torch), so a function goes through all of a module's cases.
"""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.train.mesh import MeshConfig, connect

ROOT = Path(__file__).parents[3]
SECONDS = 240
"""Until processes that hang are ended."""


def run_ranks(world: int, function: Callable[[Path], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """What the function returns for the folder in each rank of a world. It makes `Mesh`es of the world as it likes."""
    shared = environment(world)
    name = f"{function.__module__}:{function.__name__}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sae.train.ranks", name, str(folder / f"rank-{rank}.safetensors")],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "\n".join(errors)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world)]


def environment(world: int) -> dict[str, str]:
    """What torchrun tells the processes of a new world, but for their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    module, _, attribute = sys.argv[1].partition(":")
    torch.set_num_threads(1)
    with connect(MeshConfig(latents=int(os.environ["WORLD_SIZE"])), timeout_seconds=60):
        tensors = getattr(importlib.import_module(module), attribute)(Path(sys.argv[2]).parent)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, sys.argv[2])
    sys.stderr.flush()
    os._exit(0)  # taking torch apart takes a second
