"""A small snapshot, sweeps to train on it, and ways to break them off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sae.architectures import BatchTopKConfig, StandardConfig, TopKConfig
from sae.architectures.config import Resampling
from sae.errors import StopRequested
from sae.store import layout
from sae.store.artefacts.records import Record
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train.config import SAESpec, TrainConfig

MakeSnapshot = Callable[..., Snapshot]
ROWS, D_IN, BATCH = 210, 6, 32
"""An epoch has 7 batches, the last one short."""

RESAMPLED = StandardConfig(
    d_sae=30, l1_coefficient=3, resampling=Resampling(every_steps=4, silent_tokens=60, n_inputs=100)
)


def parts_of_rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    present = rng.random((ROWS, 12)) < 0.2
    act = (present * rng.random((ROWS, 12))) @ rng.standard_normal((12, D_IN)) * 5 + 3
    return np.split(act.astype(np.float32), [100])


def spec_of(snapshot: Snapshot, **changes: object) -> SAESpec:
    config = {
        "sae": TopKConfig(d_sae=16, k=2, k_aux=4),
        "batch_rows": BATCH,
        "n_tokens": 600,
        "lr": 0.01,
        "auxk_after_tokens": 90,
        "dead_after_tokens": 90,
    }
    return SAESpec(config=TrainConfig.model_validate(config | changes), snapshot=snapshot.ref, order_seed=7)


def sweep_of(snapshot: Snapshot) -> list[SAESpec]:
    return [
        spec_of(snapshot),
        spec_of(snapshot, seed=1, n_tokens=300),
        spec_of(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.5), init="farthest_point"),
        spec_of(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), init="default"),
        spec_of(snapshot, init="density", input_scale="none", ema_decay=0.9, max_grad_norm=0.1),
        spec_of(snapshot, sae=BatchTopKConfig(d_sae=16, k=2, k_aux=4), ema_decay=0.9),
        spec_of(snapshot, sae=RESAMPLED, init="kaiming", ema_decay=0.9),
        spec_of(
            snapshot,
            sae=StandardConfig(d_sae=9, l1_coefficient=2, decoder="free", l1_warmup_fraction=0.5),
            init="small",
            input_scale="sqrt_d",
        ),
    ]


def file_bytes(storage: Storage, record: Record) -> dict[str, bytes]:
    return {entry.name: storage.read_bytes(record.path(entry.name)) for entry in record.files}


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done == step:
            raise Interrupted

    return progress


def stop_at(*steps: int) -> Callable[..., None]:
    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done in steps:
            raise StopRequested("asked to stop")

    return progress


def checkpoints_of(storage: Storage, spec: SAESpec) -> dict[str, list[str]]:
    """Attempt -> the names of its files."""
    folder = layout.checkpoint_folder(spec.ref)
    return {attempt: storage.list(f"{folder}/{attempt}") for attempt in storage.list(folder)}


def checkpoint_names(*steps: int) -> list[str]:
    return [f"step-{step:08d}.{ending}" for step in steps for ending in ("json", "safetensors")]


def fresh_root(tmp_path: Path, name: str, make_snapshot: MakeSnapshot) -> tuple[Storage, Snapshot]:
    storage = Storage(str(tmp_path / name))
    return storage, make_snapshot(storage, parts_of_rows(), row_group_rows=20)
