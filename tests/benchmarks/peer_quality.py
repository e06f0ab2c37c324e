"""Quality at equal tokens: our defaults beside each peer's best of three learning rates, on the same rows.

python -m tests.benchmarks.peer_quality ENVIRONMENTS [--tokens 524288] [--sets dictionary,hierarchy,mlp]
[--peers "NAME;..."] [--seeds 3] [--rows FOLDER]

Peers warm up over 5 % and fall to zero over the last 20 % of the steps, as we do: their own defaults are meant for runs
of hundreds of thousands of steps. The set `mlp` is read from FOLDER/mlp.train.npy and mlp.heldout.npy, made by
`sae-pipeline extract` and `sae-pipeline store export default FOLDER/mlp.train.npy --format npy --split train` (and
heldout).
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.architectures import SAE, TopKConfig
from sae.metrics import FiringCounts, ReconstructionSums, max_cosines
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun
from tests.benchmarks.peer_sets import ActivationSet, dictionary, given, hierarchy
from tests.benchmarks.peer_trainers import PEERS, Peer, train

D_SAE, K, BATCH_ROWS = 2048, 32, 2048
N_HELDOUT = 65_536
EVALUATION_ROWS = 4096
WARMUP, DECAY = 0.05, 0.2
RECOVERED = 0.9
CHANCE_MARGIN = 0.02


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


def train_ours(data: ActivationSet, config: TrainConfig) -> SAE:
    """On the rows in their order, as the peers see them."""
    batches = data.train.split(BATCH_ROWS)
    run = new_run(data, config, len(batches))
    for batch in batches:
        run.advance(batch)
    return run.result()


def train_theirs(data: ActivationSet, environments: Path, peer: Peer, lr: float, seed: int) -> SAE:
    n_steps = len(data.train) // BATCH_ROWS
    case = {
        "architecture": "topk",
        "d_in": data.train.shape[1],
        "d_sae": D_SAE,
        "k": K,
        "batch_rows": BATCH_ROWS,
        "n_steps": n_steps,
        "bf16": False,
        "lr": lr,
        "seed": seed,
        "warmup_steps": round(WARMUP * n_steps),
        "decay_steps": round(DECAY * n_steps),
        "ours": None,
    }
    return train(environments, peer, data.train.numpy(), case).sae(D_SAE, K)


def spread(qualities: list[Quality]) -> str:
    """Mean and range over seeds."""
    fvus = [quality.fvu for quality in qualities]
    return f"FVU {statistics.mean(fvus):.4f} ({min(fvus):.4f}-{max(fvus):.4f}, {len(fvus)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", type=Path)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--sets", default="dictionary,hierarchy,mlp")
    parser.add_argument("--peers", default="all", help='names joined by ";"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path(".bench/sets"))
    options = parser.parse_args()
    n_rows = options.tokens // BATCH_ROWS * BATCH_ROWS
    sets: dict[str, Callable[[], ActivationSet]] = {
        "dictionary": lambda: dictionary(n_rows, N_HELDOUT),
        "hierarchy": lambda: hierarchy(n_rows, N_HELDOUT),
        "mlp": lambda: given("mlp", options.rows / "mlp.train.npy", options.rows / "mlp.heldout.npy", n_rows),
    }
    peers = [peer for peer in PEERS if options.peers == "all" or peer.name in options.peers.split(";")]
    print(f"TopK k={K}, {D_SAE:,} latents, batches of {BATCH_ROWS:,} rows; FVU, dead share and L0 on held-out rows")
    for name in options.sets.split(","):
        data = sets[name]()
        print(
            f"\n{name}: {len(data.train):,} rows of {data.train.shape[1]}, {len(data.heldout):,} held out", flush=True
        )
        ours = []
        for seed in range(options.seeds):
            config = TrainConfig(sae=TopKConfig(d_sae=D_SAE, k=K), batch_rows=BATCH_ROWS, seed=seed)
            ours.append(measure(train_ours(data, config), data))
            print(f"  ours, seed {seed:<34} {ours[-1]}", flush=True)
        print(f"  ours: {spread(ours)}", flush=True)
        for peer in peers:
            by_lr = {}
            for lr in peer.lrs:
                by_lr[lr] = measure(train_theirs(data, options.environments, peer, lr, 0), data)
                print(f"  {f'{peer.name}, lr {lr:g}':<45} {by_lr[lr]}", flush=True)
            lr = min(by_lr, key=lambda lr: by_lr[lr].fvu)
            ratio = statistics.mean(quality.fvu for quality in ours) / by_lr[lr].fvu
            print(f"  ours / {peer.name} at its best (lr {lr:g}): FVU {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
