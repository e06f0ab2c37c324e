"""A sweep that was broken off, stopped or damaged ends with the bytes of one that was not."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures import BatchTopKConfig, StandardConfig
from sae.errors import StopRequested, TrainingError
from sae.store import layout
from sae.store.artefacts.records import read_record
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train import threshold
from sae.train.checkpoint import save_checkpoint
from sae.train.loop import train_saes
from tests.sae.train.sweeps import (
    ROWS,
    Interrupted,
    MakeSnapshot,
    checkpoint_names,
    checkpoints_of,
    file_bytes,
    fresh_root,
    interrupt_at,
    spec_of,
    stop_at,
    sweep_of,
)


@pytest.mark.parametrize("step", [2, 7, 8, 19])
def test_an_interrupted_sweep_ends_with_the_bytes_of_an_uninterrupted_one(
    step: int, storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = sweep_of(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=3)
    broken_storage, _ = fresh_root(tmp_path, "broken", make_snapshot)
    with pytest.raises(Interrupted):
        train_saes(broken_storage, specs, checkpoint_every_steps=3, progress=interrupt_at(step))
    done: list[int] = []
    records = train_saes(broken_storage, specs, checkpoint_every_steps=3, progress=lambda done_, *_: done.append(done_))
    if step < 10:  # afterwards the short one of the sweep is finished, and trained anew from the start
        assert done[0] == step // 3 * 3 + 1
    for record, reference in zip(records, expected, strict=True):
        assert file_bytes(broken_storage, record) == file_bytes(storage, reference)
        assert record.metrics == reference.metrics


def test_saes_resume_from_checkpoints_of_different_steps(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = sweep_of(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    broken, _ = fresh_root(tmp_path, "broken", make_snapshot)
    for spec, step in zip(specs, (5, 7, 9, 16, 2, 12, 13, 3), strict=True):
        with pytest.raises(Interrupted):
            train_saes(broken, [spec], checkpoint_every_steps=2, progress=interrupt_at(step))
    records = train_saes(broken, specs, checkpoint_every_steps=2)
    for record, reference in zip(records, expected, strict=True):
        assert file_bytes(broken, record) == file_bytes(storage, reference)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "pointer"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str,
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = spec_of(snapshot)
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    broken, _ = fresh_root(tmp_path, "broken", make_snapshot)
    with pytest.raises(Interrupted):
        train_saes(broken, [spec], checkpoint_every_steps=3, progress=interrupt_at(10))
    ((attempt, names),) = checkpoints_of(broken, spec).items()
    assert names == ["metrics.parquet", *checkpoint_names(6, 9)]
    folder = f"{layout.checkpoint_folder(spec.ref)}/{attempt}"
    assert pq.read_table(broken.full(f"{folder}/metrics.parquet"))["step"].to_pylist() == list(range(1, 10))
    newest = f"{folder}/step-00000009.safetensors"
    data = bytearray(broken.read_bytes(newest))
    if damage == "truncate":
        broken.replace(newest, bytes(data[:-8]))
    elif damage == "flip":
        data[-1] ^= 1
        broken.replace(newest, bytes(data))
    elif damage == "delete":
        broken.remove(newest)
    else:
        broken.replace(f"{folder}/step-00000009.json", b"{")
    done: list[int] = []
    (record,) = train_saes(broken, [spec], checkpoint_every_steps=3, progress=lambda done_, *_: done.append(done_))
    assert done[0] == 7
    assert "step-00000009.json is passed over" in caplog.text
    assert file_bytes(broken, record) == file_bytes(storage, expected)


def test_a_stop_at_any_step_saves_that_step(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = sweep_of(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    stopped, _ = fresh_root(tmp_path, "stopped", make_snapshot)
    for step in range(1, 10):
        done: list[int] = []

        def progress(at: int, *_: object, done: list[int] = done) -> None:
            done.append(at)
            raise StopRequested("asked to stop")

        with pytest.raises(
            StopRequested, match=rf"asked to stop: training stopped at step {step} of 20, the same call"
        ):
            train_saes(stopped, specs, checkpoint_every_steps=100, progress=progress)
        assert done == [step]
    for record, reference in zip(train_saes(stopped, specs, checkpoint_every_steps=4), expected, strict=True):
        assert file_bytes(stopped, record) == file_bytes(storage, reference)
        assert record.metrics == reference.metrics
        assert stopped.list(layout.checkpoint_folder(record.ref)) == []


def test_a_stopped_sweep_keeps_what_its_members_had_reached_before(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = [spec_of(snapshot), spec_of(snapshot, seed=1), spec_of(snapshot, seed=2)]
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    stopped, _ = fresh_root(tmp_path, "stopped", make_snapshot)
    for spec, step in zip(specs, (12, 5, 8), strict=True):
        with pytest.raises(StopRequested):
            train_saes(stopped, [spec], checkpoint_every_steps=50, progress=stop_at(step))
    with pytest.raises(StopRequested, match="at step 10 of 20"):
        train_saes(stopped, specs, checkpoint_every_steps=50, progress=stop_at(10))
    steps = [{name for names in checkpoints_of(stopped, spec).values() for name in names} for spec in specs]
    assert steps == [{"metrics.parquet", *checkpoint_names(*at)} for at in ((12,), (5, 10), (8, 10))]
    for record, reference in zip(train_saes(stopped, specs, checkpoint_every_steps=50), expected, strict=True):
        assert file_bytes(stopped, record) == file_bytes(storage, reference)


def test_a_calibration_that_is_killed_is_done_again_to_the_same_bytes(
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(snapshot, sae=BatchTopKConfig(d_sae=16, k=2, k_aux=4))
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    broken, _ = fresh_root(tmp_path, "broken", make_snapshot)

    def killed(blocks: Iterable[torch.Tensor], n: int) -> torch.Tensor:
        next(iter(blocks))
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(threshold, "largest_values", killed)
        with pytest.raises(Interrupted):
            train_saes(broken, [spec], checkpoint_every_steps=3)
    assert read_record(broken, spec.ref) is None
    (record,) = train_saes(broken, [spec], checkpoint_every_steps=3)
    assert file_bytes(broken, record) == file_bytes(storage, expected)
    assert record.metrics == expected.metrics


def test_a_stop_between_two_points_of_the_curve_leaves_no_trace_in_it(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    spec = spec_of(snapshot, n_tokens=ROWS * 60)  # a point every second step
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    stopped, _ = fresh_root(tmp_path, "stopped", make_snapshot)
    for step in (7, 8, 101):
        with pytest.raises(StopRequested):
            train_saes(stopped, [spec], checkpoint_every_steps=1000, progress=stop_at(step))
    (record,) = train_saes(stopped, [spec], checkpoint_every_steps=1000)
    assert file_bytes(stopped, record) == file_bytes(storage, expected)


def test_without_checkpoints_a_stop_says_so_and_writes_none(storage: Storage, snapshot: Snapshot) -> None:
    with pytest.raises(StopRequested, match=r"stopped at step 3 of 20, without a checkpoint"):
        train_saes(storage, [spec_of(snapshot)], checkpoint_every_steps=0, progress=stop_at(3))
    assert checkpoints_of(storage, spec_of(snapshot)) == {}


def test_a_stop_after_the_last_step_stops_nothing(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [spec_of(snapshot)], checkpoint_every_steps=3, progress=stop_at(20))
    assert record == read_record(storage, spec_of(snapshot).ref)


def test_runs_of_the_same_sae_at_the_same_time_do_not_disturb_each_other(
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sae.train.loop.begin_checkpoint", save_checkpoint)  # each is there before the next step
    spec = spec_of(snapshot)
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    shared, _ = fresh_root(tmp_path, "shared", make_snapshot)
    attempts: list[dict[str, list[str]]] = []

    def run_others(done: int, *_: object) -> None:
        if done == 5:  # a second run begins, goes further than this one, and is killed
            with pytest.raises(Interrupted):
                train_saes(shared, [spec], checkpoint_every_steps=2, progress=interrupt_at(11))
            attempts.append(checkpoints_of(shared, spec))
        if done == 9:  # a third goes on from where the second was, and finishes
            train_saes(shared, [spec], checkpoint_every_steps=2, progress=lambda at, *_: third.append(at))
            attempts.append(checkpoints_of(shared, spec))

    third: list[int] = []
    (record,) = train_saes(shared, [spec], checkpoint_every_steps=2, progress=run_others)
    # The second has superseded the checkpoints it began from; the first does not miss them.
    assert sorted(attempts[0].values()) == [["metrics.parquet", *checkpoint_names(*at)] for at in ((), (8, 10))]
    assert third[0] == 11
    assert attempts[1] == {}
    assert file_bytes(shared, record) == file_bytes(storage, expected)
    assert checkpoints_of(shared, spec) == {}


def test_a_stop_does_not_hide_that_an_sae_has_diverged(
    storage: Storage, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    wild = spec_of(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=1e30, init="default")
    specs = [wild, spec_of(snapshot)]
    with pytest.raises(StopRequested, match=rf"at step 7 of 20, .*; {wild.ref} .*stopped being finite"):
        train_saes(storage, specs, checkpoint_every_steps=2, progress=stop_at(7))
    assert len(caplog.records) == 1  # a diverged SAE is told once and trained no further
    with pytest.raises(TrainingError, match=f"{wild.ref} .*stopped being finite"):
        train_saes(storage, specs, checkpoint_every_steps=2)
    assert read_record(storage, spec_of(snapshot).ref) is not None
