"""A real training for gangs that meet faults: slowed where a fault is to fall, with a sign when that moment has come.

Nothing but time is changed: the SAE has the bytes of a training that is not slowed.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from sae.architectures import SAE, BatchTopKConfig
from sae.progress import Progress, silent
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train import loop, step
from sae.train.collectives import Collectives
from sae.train.config import SAESpec, TrainConfig
from sae.train.losses import Losses
from sae.train.mesh import Mesh
from sae.train.rows import SnapshotRows
from tests.conftest import write_snapshot
from tests.sae.train.sweeps import BATCH, ROWS, parts_of_rows

STEPS_PER_EPOCH = math.ceil(ROWS / BATCH)
N_STEPS, EVERY = 6 * STEPS_PER_EPOCH, 8
"""Steps, and between checkpoints."""
STEP_SECONDS, PAUSE_SECONDS = 0.03, 0.4
"""Added to a step, and to what is to be hit."""
OVER = "-over"
"""What a sign's name ends with when its moment has passed."""
STEPS = "first-steps"
"""A file that gets the time, by `time.monotonic()`, of every attempt's first step."""


def new_root(path: Path) -> tuple[Storage, SAESpec]:
    """A snapshot, and an SAE to be trained on it whose threshold is calibrated in the end."""
    storage = Storage(str(path))
    snapshot: Snapshot = write_snapshot(storage, parts_of_rows(), row_group_rows=20)
    config = TrainConfig(
        sae=BatchTopKConfig(d_sae=64, k=2, k_aux=4),
        batch_rows=BATCH,
        n_tokens=N_STEPS // STEPS_PER_EPOCH * ROWS,
        lr=0.01,
        auxk_after_tokens=90,
        dead_after_tokens=90,
    )
    return storage, SAESpec(config=config, snapshot=snapshot.ref, order_seed=7)


def train(
    storage: Storage,
    specs: Sequence[SAESpec],
    signs: str,
    pause_at: str = "",
    *,
    shared: Mesh,
    progress: Progress = silent,
) -> None:
    """`train_saes` in a rank.

    Args:
        signs: a folder that gets the file `pause_at` when that moment has come and, PAUSE_SECONDS later, one that says
            that it has passed.
        pause_at: `step-13`, between its gradients and their sum; `save-16`, when a rank has written its share of that
            checkpoint, `pointer-16`, when all have; `calibration`, between its first rows and the next; `commit`.
    """
    place = Path(signs)
    replace, read, save_sae, sum_over_rows = Storage.replace, SnapshotRows._read, loop.save_sae, step.sum_over_rows
    n_done: int | None = None

    def comes(moment: str) -> None:
        if moment == pause_at:
            (place / moment).touch()
            time.sleep(PAUSE_SECONDS)
            (place / f"{moment}{OVER}").touch()

    def slow_sum(sae: SAE, losses: Losses, shared: Collectives) -> Losses:
        time.sleep(STEP_SECONDS)
        if n_done is not None:
            comes(f"step-{n_done + 1}")
        return sum_over_rows(sae, losses, shared)

    def seen(done: int, total: int, unit: str, note: str = "") -> None:
        nonlocal n_done
        if n_done is None and shared.rank == 0:
            with (place / STEPS).open("a") as file:
                file.write(f"{time.monotonic()}\n")
        n_done = done
        progress(done, total, unit, note)

    def slow_replace(self: Storage, path: str, data: bytes) -> None:
        _, is_of_step, name = path.rpartition("/step-")
        if is_of_step and name.endswith(".json"):
            comes(f"pointer-{int(name[:8])}")
        replace(self, path, data)
        if is_of_step and name.endswith(".safetensors"):
            comes(f"save-{int(name[:8])}")

    def slow_read(self: SnapshotRows, source: Snapshot, n_rows: int, purpose: str) -> Iterator[Tensor]:
        for number, batch in enumerate(read(self, source, n_rows, purpose)):
            if number == 0 and purpose == "threshold":
                comes("calibration")
            yield batch

    def slow_save(*arguments: Any) -> None:
        save_sae(*arguments)
        comes("commit")

    with (
        mock.patch.object(step, "sum_over_rows", slow_sum),
        mock.patch.object(Storage, "replace", slow_replace),
        mock.patch.object(SnapshotRows, "_read", slow_read),
        mock.patch.object(loop, "save_sae", slow_save),
    ):
        loop.train_saes(storage, specs, checkpoint_every_steps=EVERY, progress=seen, shared=shared)
