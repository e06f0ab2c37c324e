"""`make bench-peers`: our training step between two steps of each peer's own trainer, in one process.

python -m tests.benchmarks.peer_training ENVIRONMENTS [ROW]...    rows: those of COMPARISONS, all by default
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
N_PAIRS = 9
"""Of steps that count, after one of either that does not."""
N_STEPS = 10_000
"""What the peers' schedules are made for; they are at the beginning of it."""


@dataclass(frozen=True)
class Comparison:
    """One row of the table: an SAE, and the precision of both sides, float32 unless it is said."""

    architecture: str
    d_sae: int
    selection: bool = False
    """We select in bfloat16."""
    autocast: bool = False
    """The peers that can do so on a CPU run under their own bfloat16 autocast."""

    def __str__(self) -> str:
        ours = "bf16 selection" if self.selection else "fp32"
        theirs = "bf16 autocast" if self.autocast else "fp32"
        return f"{self.architecture} n={self.d_sae}, {ours if ours == theirs else f'{ours} / {theirs}'}"

    @property
    def config(self) -> dict[str, Any]:
        """Ours."""
        own = {"l1_coefficient": 1e-3} if self.architecture == "standard" else {"k": K}
        sae = {"architecture": self.architecture, "d_sae": self.d_sae, **own}
        return {"sae": sae, "batch_rows": BATCH_ROWS, "selection": "bfloat16" if self.selection else "float32"}

    def peers(self) -> list[Peer]:
        """Those that have it."""
        return [p for p in PEERS if self.architecture in p.architectures and (p.autocast or not self.autocast)]


COMPARISONS = {
    "topk": Comparison("topk", 4096),
    "topk-selection": Comparison("topk", 4096, selection=True),
    "topk-autocast": Comparison("topk", 4096, selection=True, autocast=True),
    "topk-16384": Comparison("topk", 16384),
    "topk-16384-selection": Comparison("topk", 16384, selection=True),
    "batch_topk": Comparison("batch_topk", 4096),
    "batch_topk-autocast": Comparison("batch_topk", 4096, selection=True, autocast=True),
    "standard": Comparison("standard", 4096),
    "standard-autocast": Comparison("standard", 4096, autocast=True),
}


def row(comparison: Comparison, peer: Peer, outcome: Outcome) -> Row:
    """The line of one peer."""
    ours, theirs = (statistics.median(column) for column in zip(*outcome.seconds, strict=True))
    return Row(
        f"{comparison} | {peer.name} {outcome.version}",
        f"{ours * 1e3:,.1f} ms",
        f"{theirs * 1e3:,.1f} ms",
        tuple(b / a for a, b in outcome.seconds),
    )


def fastest(outcome: Outcome) -> float:
    """Their fastest step over ours: what is left of the ratio when other processes disturb most steps."""
    ours, theirs = (min(column) for column in zip(*outcome.seconds, strict=True))
    return theirs / ours


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
    print(f"{'what':<62} {'ours':>16} {'theirs':>16} {'ratio':>7}  {'min-max':<11} of, and of the fastest steps")
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
            "bf16": comparison.autocast,
            "lr": None,
            "seed": 0,
            "warmup_steps": None,
            "decay_steps": None,
            "ours": comparison.config,
        }
        rows = []
        for peer in comparison.peers():
            outcome = train(environments, peer, x, case)
            rows.append(row(comparison, peer, outcome))
            print(f"{rows[-1]}, {fastest(outcome):.2f}", flush=True)
        closest = best(rows)
        print(
            f"{comparison}: {statistics.median(closest.ratios):.2f} times the best peer, {closest.what.split(' | ')[1]}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
