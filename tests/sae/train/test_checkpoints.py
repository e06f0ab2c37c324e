"""Checkpoints of a run are written while it goes on, and hold the step at which they were begun."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from sae.errors import StopRequested, TransientError
from sae.store.artefacts.checkpoint_files import CheckpointFiles
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train.loop import train_saes
from tests.sae.train.sweeps import (
    Interrupted,
    MakeSnapshot,
    checkpoint_names,
    checkpoints_of,
    file_bytes,
    fresh_root,
    spec_of,
    sweep_of,
)


@pytest.mark.parametrize("error", [Interrupted, StopRequested])
def test_training_goes_on_while_a_checkpoint_is_written(
    error: type[Exception],
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of step 4 is written in step 6, after which the run is broken off."""
    specs = sweep_of(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    broken, _ = fresh_root(tmp_path, "broken", make_snapshot)
    may_write, write = threading.Event(), CheckpointFiles.write_tensors

    def write_late(files: CheckpointFiles, path: str, tensors: Mapping[str, Tensor]) -> str:
        assert may_write.wait(30)
        return write(files, path, tensors)

    def progress(done: int, *_: object) -> None:
        assert checkpoints_of(broken, specs[0]) == {}
        if done == 6:
            may_write.set()
            raise error("broken off")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFiles, "write_tensors", write_late)
        with pytest.raises(error):
            train_saes(broken, specs, checkpoint_every_steps=4, progress=progress)
    steps = (4, 6) if error is StopRequested else (4,)
    for spec in specs:
        assert list(checkpoints_of(broken, spec).values()) == [["metrics.parquet", *checkpoint_names(*steps)]]
    done: list[int] = []
    records = train_saes(broken, specs, checkpoint_every_steps=4, progress=lambda step, *_: done.append(step))
    assert done[0] == steps[-1] + 1
    for record, reference in zip(records, expected, strict=True):
        assert file_bytes(broken, record) == file_bytes(storage, reference)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(snapshot)
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    broken, _ = fresh_root(tmp_path, "broken", make_snapshot)
    write = CheckpointFiles.write_tensors

    def fail(files: CheckpointFiles, path: str, tensors: Mapping[str, Tensor]) -> str:
        if "step-00000008" in path:
            raise TransientError(f"{path}: the bucket is away")
        return write(files, path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFiles, "write_tensors", fail)
        with pytest.raises(TransientError, match=r"step-00000008.*the bucket is away"):
            train_saes(broken, [spec], checkpoint_every_steps=4)
    assert list(checkpoints_of(broken, spec).values()) == [["metrics.parquet", *checkpoint_names(4)]]
    (record,) = train_saes(broken, [spec], checkpoint_every_steps=4)
    assert file_bytes(broken, record) == file_bytes(storage, expected)
