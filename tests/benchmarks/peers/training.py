"""What the training scripts of this folder share: the case, our steps between two of theirs, the outcome.

Each script gives its peer's own training loop an iterable of batches. Whatever passes until the loop asks for the next
batch is one of its steps, bookkeeping included, and before handing that out we make a step of ours on the same rows.
"""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.architectures import build_sae
from sae.architectures.config import TopKConfig
from sae.train.config import TrainConfig
from sae.train.rows import RowsInMemory
from sae.train.run import DataMoments, TrainingRun

HOOK = "act"
CHECKED_ROWS = 4096


@dataclass(frozen=True)
class Case:
    """What is to be trained, and on which rows."""

    folder: Path
    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch_rows: int
    n_steps: int
    bf16: bool
    """The peer's own bf16 autocast."""
    lr: float | None
    """None: the peer's default."""
    seed: int
    warmup_steps: int | None
    """None: the peer's default."""
    decay_steps: int | None
    """Steps, at the end, in which the learning rate falls. None: the peer's default."""
    ours: dict | None
    """Our TrainConfig, where our step is timed between two of theirs; without it they train alone."""
    n_pairs: int = 0
    """Steps of either that are timed, of the `n_steps` that the peer's schedules are made for."""

    @property
    def n_tokens(self) -> int:
        return self.n_steps * self.batch_rows


@dataclass
class Batches:
    """The rows of the case in their order, from the first again when they are used up; every `iter` begins anew."""

    case: Case
    rows: Tensor
    """[rows, d_in]"""

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.case.n_steps):
            start = step * self.case.batch_rows % len(self.rows)
            yield self.rows[start : start + self.case.batch_rows]


class EnoughError(Exception):
    """Raised in a peer's loop, which would otherwise go on to its last step, when all pairs are timed."""


@dataclass
class Turns(Batches):
    """The same batches, with a step of ours before each. The first of either is a warm-up and not counted.

    Raises: EnoughError when as many pairs as the case wants are timed.
    """

    ours: TrainingRun
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """(ours, theirs), pair by pair."""

    def __iter__(self) -> Iterator[Tensor]:
        self.seconds.clear()
        pending = None
        # A peer may set how products are made for the whole process; ours are made as if it had not.
        precision = torch.get_float32_matmul_precision()
        for step, batch in enumerate(super().__iter__()):
            now = time.perf_counter()
            if pending is not None and step > 1:
                self.seconds.append((pending[0], now - pending[1]))
                if len(self.seconds) == self.case.n_pairs:
                    raise EnoughError
            theirs = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            started = time.perf_counter()
            self.ours.advance(batch)
            ended = time.perf_counter()
            torch.set_float32_matmul_precision(theirs)
            pending = (ended - started, time.perf_counter())
            yield batch


Weights = dict[str, Tensor]
"""W_enc, W_dec [d_sae, d_in], b_enc [d_sae], b_dec [d_in]: our layout, b_dec subtracted before the encoder."""
Reconstruct = Callable[[Tensor], Tensor]


def report(package: str, train: Callable[[Case, Batches], tuple[Weights, Reconstruct]]) -> None:
    """Train the case in the folder of argv[1]. Prints the times, or writes the weights beside it."""
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    case = Case(folder, **json.loads((folder / "case.json").read_text()))
    rows = torch.from_numpy(np.load(folder / "rows.npy", mmap_mode="c"))
    outcome: dict[str, object] = {"version": version(package), "torch": torch.__version__}
    if case.ours is not None:
        source = RowsInMemory(rows, case.batch_rows, case.seed)
        run = TrainingRun(TrainConfig.model_validate(case.ours), DataMoments.of(rows), case.n_steps, rows=source)
        turns = Turns(case, rows, run)
        with contextlib.suppress(EnoughError):
            train(case, turns)
        outcome["seconds"] = turns.seconds
    else:
        weights, reconstruct = train(case, Batches(case, rows))
        weights = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
        check(case, weights, reconstruct, rows[:CHECKED_ROWS])
        save_file(weights, folder / "weights.safetensors")
    print(json.dumps(outcome))


@torch.no_grad()
def check(case: Case, weights: Weights, reconstruct: Reconstruct, x: Tensor) -> None:
    """Raises: AssertionError unless an SAE of ours with these weights reconstructs x as the peer's own does.

    But for one row in a hundred: where latents nearly tie for the last place, rounding decides.
    """
    sae = build_sae(TopKConfig(d_sae=case.d_sae, k=case.k, k_aux=0), case.d_in)
    sae.load_state_dict(weights)
    expected = reconstruct(x)
    errors = (sae(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert float((errors < 1e-3).float().mean()) > 0.99, (
        f"our SAE with their weights differs from theirs by {float(errors.median()):.2g} in half of the rows"
    )
