"""How good an SAE is that was trained on so many rows of a set: training ours, measuring anyone's, keeping the figures.

More tokens than MAX_ROWS, or than a set has rows, are several passes.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.architectures import SAE, TopKConfig
from sae.metrics import FiringCounts, ReconstructionSums, max_cosines
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from tests.benchmarks.peer_sets import ActivationSet, dictionary, given, hierarchy

K, BATCH_ROWS = 32, 2048
MAX_ROWS = 976 * BATCH_ROWS
N_HELDOUT = 65_536
EVALUATION_ROWS = 4096
RECOVERED = 0.9
CHANCE_MARGIN = 0.02
SETS = ("dictionary", "hierarchy", "mlp")


@dataclass(frozen=True)
class Quality:
    """One SAE on held-out rows."""

    fvu: float
    l0: float
    dead: float
    mmcs: float | None = None
    """Mean over the true features of the largest cosine to a decoder row."""
    recovered: float | None = None
    """Share of the true features with a cosine above .9."""

    def __str__(self) -> str:
        known = "" if self.mmcs is None else f"  MMCS {self.mmcs:.3f}  recovered {self.recovered:6.1%}"
        return f"FVU {self.fvu:.4f}  dead {self.dead:6.1%}  L0 {self.l0:.1f}{known}"


class Kept:
    """Figures in a file of JSON lines, each with what was trained. Several processes may add to one file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def get(self, what: dict[str, Any]) -> Quality | None:
        """What was measured of it, by whichever process."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        found = (line["quality"] for line in map(json.loads, lines) if line["what"] == what)
        quality = next(found, None)
        return Quality(**quality) if quality else None

    def add(self, what: dict[str, Any], quality: Quality) -> None:
        """In one write, so that lines of several processes do not mix."""
        line = json.dumps({"what": what, "quality": asdict(quality)}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def load_set(name: str, n_tokens: int, folder: Path) -> ActivationSet:
    """The rows of which `n_tokens` are one or several passes. folder: where mlp.train.npy and mlp.heldout.npy are."""
    n_rows = min(n_tokens // BATCH_ROWS * BATCH_ROWS, MAX_ROWS)
    if name == "mlp":
        n_given = len(np.load(folder / "mlp.train.npy", mmap_mode="r"))
        n_rows = min(n_rows, n_given // BATCH_ROWS * BATCH_ROWS)
        return given(name, folder / "mlp.train.npy", folder / "mlp.heldout.npy", n_rows)
    return {"dictionary": dictionary, "hierarchy": hierarchy}[name](n_rows, N_HELDOUT)


@torch.no_grad()
def measure(sae: SAE, data: ActivationSet) -> Quality:
    """By one code for everybody's weights."""
    sums, firing = ReconstructionSums(), FiringCounts(sae.d_sae)
    for x in data.heldout.split(EVALUATION_ROWS):
        sparse = sae.encode_sparse(x)
        sums.add(x, sae.decode_sparse(sparse, len(x)))
        firing.add_sparse(sparse, len(x))
    if data.features is None:
        return Quality(sums.fvu, firing.l0, firing.dead_fraction)
    cosines = max_cosines(data.features, sae.W_dec)
    recovered = float((cosines > RECOVERED).double().mean())
    return Quality(sums.fvu, firing.l0, firing.dead_fraction, float(cosines.double().mean()), recovered)


def chance(features: Tensor, n_rows: int) -> float:
    """MMCS of the features with random directions."""
    random = torch.randn(n_rows, features.shape[1], generator=torch.Generator().manual_seed(20_240_601))
    return float(max_cosines(features, random).double().mean())


def new_run(data: ActivationSet, config: TrainConfig, n_steps: int) -> TrainingRun:
    """Raises: AssertionError when the SAE starts nearer to the true features than random directions are."""
    source = RowsInMemory(data.train, config.batch_rows, config.seed)
    run = TrainingRun(config, DataMoments.of(data.train), n_steps, rows=source)
    if data.features is not None:
        start = float(max_cosines(data.features, run.state.sae.W_dec.detach()).double().mean())
        by_chance = chance(data.features, run.state.sae.d_sae)
        assert abs(start - by_chance) < CHANCE_MARGIN, (
            f"{data.name}: MMCS {start:.3f} at the start, chance {by_chance:.3f}"
        )
    return run


def topk(d_sae: int, seed: int, settings: dict[str, Any]) -> TrainConfig:
    """Our default but for these settings: fields of TrainConfig, and `sae.` fields of TopKConfig."""
    of_sae = {name.removeprefix("sae."): value for name, value in settings.items() if name.startswith("sae.")}
    others = {name: value for name, value in settings.items() if not name.startswith("sae.")}
    sae = TopKConfig(d_sae=d_sae, k=K, **of_sae)
    return TrainConfig.model_validate({"sae": sae, "batch_rows": BATCH_ROWS, "seed": seed} | others)


def train_ours(data: ActivationSet, config: TrainConfig, n_tokens: int) -> SAE:
    """On the rows in their order, as the peers see them."""
    n_steps = n_tokens // BATCH_ROWS
    run = new_run(data, config, n_steps)
    for step in range(n_steps):
        start = step * BATCH_ROWS % len(data.train)
        run.advance(data.train[start : start + BATCH_ROWS])
    return run.result()


def what_of_ours(data: ActivationSet, config: TrainConfig, n_tokens: int) -> dict[str, Any]:
    """Under which it is kept: all of the config, so that another default is another recipe."""
    return {"trainer": "ours", "set": data.name, "tokens": n_tokens, "config": config.model_dump(mode="json")}


def qualities_of_ours(
    data: ActivationSet, n_tokens: int, d_sae: int, seeds: int, settings: dict[str, Any], kept: Kept
) -> Iterator[Quality]:
    """Of one recipe, seed by seed."""
    for seed in range(seeds):
        config = topk(d_sae, seed, settings)
        what = what_of_ours(data, config, n_tokens)
        quality = kept.get(what)
        if quality is None:
            quality = measure(train_ours(data, config, n_tokens), data)
            kept.add(what, quality)
        yield quality
