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

from sae.architectures import BatchTopKConfig
from sae.progress import Progress, silent
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train import loop
from sae.train.config import SAESpec, TrainConfig
from sae.train.mesh import Mesh
from sae.train.rows import SnapshotRows
from tests.conftest import write_snapshot
from tests.sae.train.sweeps import BATCH, ROWS, parts_of_rows

STEPS_PER_EPOCH = math.ceil(ROWS / BATCH)
N_STEPS, EVERY = 6 * STEPS_PER_EPOCH, 8
"""Steps, and between checkpoints."""
STEP_SECONDS, PAUSE_SECONDS = 0.03, 0.4
"""Added to a step, and to what is slowed to be hit."""
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


def train(storage: Storage, specs: Sequence[SAESpec], signs: str, *, shared: Mesh, progress: Progress = silent) -> None:
    """`train_saes` in a rank.

    Args:
        signs: a folder that gets a file when a moment has come: `step-13`, `save-16`, `last-step`,
            `calibration`, `commit`.
    """
    place = Path(signs)
    replace, read, save_sae = Storage.replace, SnapshotRows._read, loop.save_sae
    n_seen = 0

    def seen(done: int, total: int, unit: str, note: str = "") -> None:
        nonlocal n_seen
        n_seen += 1
        if shared.rank == 0:
            if n_seen == 1:
                with (place / STEPS).open("a") as file:
                    file.write(f"{time.monotonic()}\n")
            (place / ("last-step" if done == total - 1 else f"step-{done}")).touch()
        time.sleep(STEP_SECONDS)
        progress(done, total, unit, note)

    def slow_replace(self: Storage, path: str, data: bytes) -> None:
        replace(self, path, data)
        if "/step-" in path:
            (place / f"save-{int(path.rpartition('/step-')[2][:8])}").touch()
            time.sleep(PAUSE_SECONDS / 2)

    def slow_read(self: SnapshotRows, source: Snapshot, n_rows: int, purpose: str) -> Iterator[Tensor]:
        for number, batch in enumerate(read(self, source, n_rows, purpose)):
            if number == 0 and purpose == "threshold":
                (place / "calibration").touch()
                time.sleep(PAUSE_SECONDS)
            yield batch

    def slow_save(*arguments: Any) -> None:
        (place / "commit").touch()
        time.sleep(PAUSE_SECONDS / 2)
        save_sae(*arguments)
        time.sleep(PAUSE_SECONDS / 2)

    with (
        mock.patch.object(Storage, "replace", slow_replace),
        mock.patch.object(SnapshotRows, "_read", slow_read),
        mock.patch.object(loop, "save_sae", slow_save),
    ):
        loop.train_saes(storage, specs, checkpoint_every_steps=EVERY, progress=seen, shared=shared)
