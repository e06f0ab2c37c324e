"""The peers whose trainers ours is compared with, and how one of them is run in its own environment.

Each trains by its own loop (`peers/train_*.py`), with its own optimizer and its own defaults but for what a case sets.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from sae.architectures import SAE, TopKConfig, build_sae

SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """A library's trainer."""

    name: str
    environment: str
    script: str
    lrs: tuple[float, float, float]
    """Tried where quality is compared; its own default for 2,048 latents is beside it."""
    architectures: tuple[str, ...] = ("topk", "batch_topk", "standard")
    autocast: bool = False
    """Whether it has bf16 autocast on a CPU."""
    arguments: tuple[str, ...] = ()


PEERS = (
    Peer("sae-lens", "sae-lens", "train_saelens.py", (2e-3, 4e-3, 8e-3), autocast=True),  # 3e-4
    Peer("dictionary-learning", "dictionary-learning", "train_dictionary_learning.py", (3e-3, 6e-3, 1.2e-2)),  # 5.7e-4
    Peer("sparsify, adam", "sparsify", "train_sparsify.py", (6e-3, 1.2e-2, 2.4e-2), ("topk",), arguments=("adam",)),
    # 5.7e-4 and, its default optimizer, 1.4e-2
    Peer("sparsify, signum", "sparsify", "train_sparsify.py", (7e-3, 1.4e-2, 2.8e-2), ("topk",), arguments=("signum",)),
    Peer("llamascopium", "llamascopium", "train_llamascopium.py", (1e-3, 4e-3, 8e-3), autocast=True),  # 4e-4
)


@dataclass(frozen=True)
class Outcome:
    """What a peer's script printed and wrote."""

    version: str
    seconds: list[tuple[float, float]]
    """(ours, theirs) of steps made in turn; empty where they trained alone."""
    weights: dict[str, Tensor] | None
    """In our layout."""

    def sae(self, d_sae: int, k: int) -> SAE:
        """The TopK SAE with these weights."""
        assert self.weights is not None
        sae = build_sae(TopKConfig(d_sae=d_sae, k=k, k_aux=0), self.weights["b_dec"].shape[0])
        sae.load_state_dict(self.weights)
        return sae.requires_grad_(False)


def train(environments: Path, peer: Peer, rows: np.ndarray, case: dict[str, Any]) -> Outcome:
    """Train a case in the peer's environment. rows: float32 [rows, d_in]; case: the fields of `peers.training.Case`."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", rows)
        (Path(folder) / "case.json").write_text(json.dumps(case))
        python = environments / peer.environment / "bin" / "python"
        command = [str(python), str(SCRIPTS / peer.script), folder, *peer.arguments]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_MODE": "disabled"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{peer.name} failed with exit code {result.returncode}:\n{result.stderr[-4000:]}")
        printed = json.loads(result.stdout.splitlines()[-1])
        weights = Path(folder) / "weights.safetensors"
        return Outcome(
            printed["version"],
            [tuple(pair) for pair in printed.get("seconds", ())],
            load_file(weights) if weights.exists() else None,
        )
