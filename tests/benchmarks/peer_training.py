"""`make bench-peers`: our training step between two steps of each peer's own trainer, in one process.

python -m tests.benchmarks.peer_training ENVIRONMENTS [ROW]...    rows: topk, topk-16384, batch_topk, standard, ...
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.philox import philox
from tests.benchmarks.peer_trainers import PEERS, Outcome, Peer, train
from tests.benchmarks.timing import Row

D_IN, K, BATCH_ROWS, N_BATCHES = 512, 32, 4096, 4
N_PAIRS = 7
"""Of steps that count, after one of either that does not."""
N_STEPS = 10_000
"""What the peers' schedules are made for; they are at the beginning of it."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table: an SAE, and the precision of both sides."""

    architecture: str
    d_sae: int
    bf16: bool = False

    def __str__(self) -> str:
        return f"{self.architecture} n={self.d_sae}{', bf16' if self.bf16 else ''}"

    @property
    def sae(self) -> dict[str, Any]:
        """Our config."""
        own = {"l1_coefficient": 1e-3} if self.architecture == "standard" else {"k": K}
        return {"architecture": self.architecture, "d_sae": self.d_sae, **own}

    def peers(self) -> list[Peer]:
        """Those that have it."""
        return [p for p in PEERS if self.architecture in p.architectures and (p.autocast or not self.bf16)]


COMPARISONS = {
    "topk": Comparison("topk", 4096),
    "topk-16384": Comparison("topk", 16384),
    "batch_topk": Comparison("batch_topk", 4096),
    "standard": Comparison("standard", 4096),
}


def row(comparison: Comparison, peer: Peer, outcome: Outcome) -> Row:
    """The line of one peer."""
    ours, theirs = (statistics.median(column) for column in zip(*outcome.seconds, strict=True))
    return Row(
        f"{comparison} / {peer.name} {outcome.version}",
        f"{ours * 1e3:,.1f} ms",
        f"{theirs * 1e3:,.1f} ms",
        tuple(b / a for a, b in outcome.seconds),
    )


def best(rows: list[Row]) -> Row:
    """The line of the peer that comes closest to us: every peer is measured beside our own steps."""
    return min(rows, key=lambda row: statistics.median(row.ratios))


def main(environments: Path, names: list[str]) -> None:
    """Measure the named rows, all by default."""
    unknown = set(names) - set(COMPARISONS)
    if unknown:
        sys.exit(f"no row {', '.join(sorted(unknown))}; there are {', '.join(COMPARISONS)}")
    x = philox("benchmark batches", D_IN).standard_normal((N_BATCHES * BATCH_ROWS, D_IN), dtype=np.float32)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; a step of {BATCH_ROWS} rows of {D_IN}")
    print(f"{'what':<62} {'ours':>16} {'theirs':>16} {'ratio':>7}  {'min-max':<11} of")
    for name in names or COMPARISONS:
        comparison = COMPARISONS[name]
        case = {
            "architecture": comparison.architecture,
            "d_in": D_IN,
            "d_sae": comparison.d_sae,
            "k": K,
            "batch_rows": BATCH_ROWS,
            "n_steps": N_STEPS,
            "n_pairs": N_PAIRS,
            "bf16": comparison.bf16,
            "lr": None,
            "seed": 0,
            "warmup_steps": None,
            "decay_steps": None,
            "ours": {"sae": comparison.sae, "batch_rows": BATCH_ROWS},
        }
        rows = []
        for peer in comparison.peers():
            rows.append(row(comparison, peer, train(environments, peer, x, case)))
            print(rows[-1], flush=True)
        closest = best(rows)
        print(
            f"{comparison}: {statistics.median(closest.ratios):.2f} times the best peer, {closest.what.split(' / ')[1]}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
