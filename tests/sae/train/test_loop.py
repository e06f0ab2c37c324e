import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures import BatchTopKConfig, StandardConfig, TopKConfig
from sae.architectures.config import Resampling
from sae.errors import ConfigError, StopRequested, StoreError, TrainingError
from sae.metrics import ReconstructionSums
from sae.store import layout
from sae.store.artefacts.records import Record, local_files, read_record
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train import threshold
from sae.train.config import SAESpec, TrainConfig
from sae.train.curve import COLUMNS
from sae.train.loop import train_saes
from sae.weights import load_sae

MakeSnapshot = Callable[..., Snapshot]
ROWS, D_IN, BATCH = 210, 6, 32
"""An epoch has 7 batches, the last one short."""

RESAMPLED = StandardConfig(
    d_sae=30, l1_coefficient=3, resampling=Resampling(every_steps=4, silent_tokens=60, n_inputs=100)
)


@pytest.fixture
def snapshot(storage: Storage, make_snapshot: MakeSnapshot) -> Snapshot:
    return make_snapshot(storage, _parts(), row_group_rows=20)


def _parts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    present = rng.random((ROWS, 12)) < 0.2
    act = (present * rng.random((ROWS, 12))) @ rng.standard_normal((12, D_IN)) * 5 + 3
    return np.split(act.astype(np.float32), [100])


def _spec(snapshot: Snapshot, **changes: object) -> SAESpec:
    config = {
        "sae": TopKConfig(d_sae=16, k=2, k_aux=4),
        "batch_rows": BATCH,
        "n_tokens": 600,
        "lr": 0.01,
        "dead_after_tokens": 90,
    }
    return SAESpec(config=TrainConfig.model_validate(config | changes), snapshot=snapshot.ref, order_seed=7)


def _sweep(snapshot: Snapshot) -> list[SAESpec]:
    return [
        _spec(snapshot),
        _spec(snapshot, seed=1, n_tokens=300),
        _spec(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.5), init="farthest_point"),
        _spec(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), init="default"),
        _spec(snapshot, init="density", input_scale="none", ema_decay=0.9, max_grad_norm=0.1),
        _spec(snapshot, sae=BatchTopKConfig(d_sae=16, k=2, k_aux=4), ema_decay=0.9),
        _spec(snapshot, sae=RESAMPLED, init="kaiming", ema_decay=0.9),
        _spec(
            snapshot,
            sae=StandardConfig(d_sae=9, l1_coefficient=2, decoder="free", l1_warmup_fraction=0.5),
            init="small",
            input_scale="sqrt_d",
        ),
    ]


def _bytes(storage: Storage, record: Record) -> dict[str, bytes]:
    return {entry.name: storage.read_bytes(record.path(entry.name)) for entry in record.files}


class Interrupted(Exception):
    pass


def _interrupt_at(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done == step:
            raise Interrupted

    return progress


def _stop_at(*steps: int) -> Callable[..., None]:
    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done in steps:
            raise StopRequested("asked to stop")

    return progress


def _checkpoints(storage: Storage, spec: SAESpec) -> dict[str, list[str]]:
    """Attempt -> the names of its files."""
    folder = layout.checkpoint_folder(spec.ref)
    return {attempt: storage.list(f"{folder}/{attempt}") for attempt in storage.list(folder)}


def _pairs(*steps: int) -> list[str]:
    return [f"step-{step:08d}.{ending}" for step in steps for ending in ("json", "safetensors")]


def _fresh(tmp_path: Path, name: str, make_snapshot: MakeSnapshot) -> tuple[Storage, Snapshot]:
    storage = Storage(str(tmp_path / name))
    return storage, make_snapshot(storage, _parts(), row_group_rows=20)


def test_the_artefact_has_weights_config_and_curve(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [_spec(snapshot)], checkpoint_every_steps=3)
    assert [entry.name for entry in record.files] == ["cfg.json", "metrics.parquet", "sae.safetensors"]
    assert record == read_record(storage, _spec(snapshot).ref)
    with local_files(storage, record) as folder:
        sae = load_sae(folder)
        curve = pq.read_table(folder / "metrics.parquet").to_pydict()
    assert (sae.d_in, sae.d_sae) == (D_IN, 16)
    assert tuple(curve) == COLUMNS
    assert curve["step"] == list(range(1, 21))
    assert curve["n_tokens"][:8] == [32, 64, 96, 128, 160, 192, 210, 242]
    assert record.metrics["n_steps"] == 20
    assert record.metrics["n_tokens"] == curve["n_tokens"][-1] == 612
    assert record.metrics["fvu"] == curve["fvu"][-1]
    assert storage.list(layout.checkpoint_folder(record.ref)) == []


def test_the_saved_sae_takes_the_activations_as_they_are_stored(storage: Storage, snapshot: Snapshot) -> None:
    spec = _spec(snapshot, n_tokens=10_000, dead_after_tokens=1000)
    (record,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    sums = ReconstructionSums()
    with local_files(storage, record) as folder:
        sae = load_sae(folder)
    for block in iter_rows(storage, read_snapshot(storage, snapshot.ref)):
        x = torch.from_numpy(block.act.astype(np.float32))
        sums.add(x, sae(x))
    assert sums.fvu < 0.4
    assert sums.fvu == pytest.approx(record.metrics["fvu"], abs=0.03)


def test_without_a_number_of_tokens_one_epoch_is_trained(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [_spec(snapshot, n_tokens=None)], checkpoint_every_steps=0)
    assert (record.metrics["n_tokens"], record.metrics["n_steps"]) == (ROWS, 7)


def test_each_sae_of_a_sweep_equals_the_one_trained_alone(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = _sweep(snapshot)
    together = train_saes(storage, specs, checkpoint_every_steps=4)
    alone_storage, _ = _fresh(tmp_path, "alone", make_snapshot)
    for spec, record in zip(specs, together, strict=True):
        (alone,) = train_saes(alone_storage, [spec], checkpoint_every_steps=0)
        assert alone.ref == record.ref == spec.ref
        assert _bytes(alone_storage, alone) == _bytes(storage, record)
        assert alone.metrics == record.metrics


@pytest.mark.parametrize("step", [2, 7, 8, 19])
def test_an_interrupted_sweep_ends_with_the_bytes_of_an_uninterrupted_one(
    step: int, storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = _sweep(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=3)
    broken_storage, _ = _fresh(tmp_path, "broken", make_snapshot)
    with pytest.raises(Interrupted):
        train_saes(broken_storage, specs, checkpoint_every_steps=3, progress=_interrupt_at(step))
    done: list[int] = []
    records = train_saes(broken_storage, specs, checkpoint_every_steps=3, progress=lambda done_, *_: done.append(done_))
    if step < 10:  # afterwards the short one of the sweep is finished, and trained anew from the start
        assert done[0] == step // 3 * 3 + 1
    for record, reference in zip(records, expected, strict=True):
        assert _bytes(broken_storage, record) == _bytes(storage, reference)
        assert record.metrics == reference.metrics


def test_saes_resume_from_checkpoints_of_different_steps(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = _sweep(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    broken, _ = _fresh(tmp_path, "broken", make_snapshot)
    for spec, step in zip(specs, (5, 7, 9, 16, 2, 12, 13, 3), strict=True):
        with pytest.raises(Interrupted):
            train_saes(broken, [spec], checkpoint_every_steps=2, progress=_interrupt_at(step))
    records = train_saes(broken, specs, checkpoint_every_steps=2)
    for record, reference in zip(records, expected, strict=True):
        assert _bytes(broken, record) == _bytes(storage, reference)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "pointer"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str,
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = _spec(snapshot)
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    broken, _ = _fresh(tmp_path, "broken", make_snapshot)
    with pytest.raises(Interrupted):
        train_saes(broken, [spec], checkpoint_every_steps=3, progress=_interrupt_at(10))
    ((attempt, names),) = _checkpoints(broken, spec).items()
    assert names == ["metrics.parquet", *_pairs(6, 9)]
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
    assert _bytes(broken, record) == _bytes(storage, expected)


def test_a_stop_at_any_step_saves_that_step(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = _sweep(snapshot)
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    stopped, _ = _fresh(tmp_path, "stopped", make_snapshot)
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
        assert _bytes(stopped, record) == _bytes(storage, reference)
        assert record.metrics == reference.metrics
        assert stopped.list(layout.checkpoint_folder(record.ref)) == []


def test_a_stopped_sweep_keeps_what_its_members_had_reached_before(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = [_spec(snapshot), _spec(snapshot, seed=1), _spec(snapshot, seed=2)]
    expected = train_saes(storage, specs, checkpoint_every_steps=0)
    stopped, _ = _fresh(tmp_path, "stopped", make_snapshot)
    for spec, step in zip(specs, (12, 5, 8), strict=True):
        with pytest.raises(StopRequested):
            train_saes(stopped, [spec], checkpoint_every_steps=50, progress=_stop_at(step))
    with pytest.raises(StopRequested, match="at step 10 of 20"):
        train_saes(stopped, specs, checkpoint_every_steps=50, progress=_stop_at(10))
    steps = [{name for names in _checkpoints(stopped, spec).values() for name in names} for spec in specs]
    assert steps == [{"metrics.parquet", *_pairs(*at)} for at in ((12,), (5, 10), (8, 10))]
    for record, reference in zip(train_saes(stopped, specs, checkpoint_every_steps=50), expected, strict=True):
        assert _bytes(stopped, record) == _bytes(storage, reference)


def test_a_calibration_that_is_killed_is_done_again_to_the_same_bytes(
    storage: Storage,
    snapshot: Snapshot,
    tmp_path: Path,
    make_snapshot: MakeSnapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = _spec(snapshot, sae=BatchTopKConfig(d_sae=16, k=2, k_aux=4))
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    broken, _ = _fresh(tmp_path, "broken", make_snapshot)

    def killed(blocks: Iterable[torch.Tensor], n: int) -> torch.Tensor:
        next(iter(blocks))
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(threshold, "largest_values", killed)
        with pytest.raises(Interrupted):
            train_saes(broken, [spec], checkpoint_every_steps=3)
    assert read_record(broken, spec.ref) is None
    (record,) = train_saes(broken, [spec], checkpoint_every_steps=3)
    assert _bytes(broken, record) == _bytes(storage, expected)
    assert record.metrics == expected.metrics


def test_a_stop_between_two_points_of_the_curve_leaves_no_trace_in_it(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    spec = _spec(snapshot, n_tokens=ROWS * 60)  # a point every second step
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    stopped, _ = _fresh(tmp_path, "stopped", make_snapshot)
    for step in (7, 8, 101):
        with pytest.raises(StopRequested):
            train_saes(stopped, [spec], checkpoint_every_steps=1000, progress=_stop_at(step))
    (record,) = train_saes(stopped, [spec], checkpoint_every_steps=1000)
    assert _bytes(stopped, record) == _bytes(storage, expected)


def test_without_checkpoints_a_stop_says_so_and_writes_none(storage: Storage, snapshot: Snapshot) -> None:
    with pytest.raises(StopRequested, match=r"stopped at step 3 of 20, without a checkpoint"):
        train_saes(storage, [_spec(snapshot)], checkpoint_every_steps=0, progress=_stop_at(3))
    assert _checkpoints(storage, _spec(snapshot)) == {}


def test_a_stop_after_the_last_step_stops_nothing(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [_spec(snapshot)], checkpoint_every_steps=3, progress=_stop_at(20))
    assert record == read_record(storage, _spec(snapshot).ref)


def test_runs_of_the_same_sae_at_the_same_time_do_not_disturb_each_other(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    spec = _spec(snapshot)
    (expected,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    shared, _ = _fresh(tmp_path, "shared", make_snapshot)
    attempts: list[dict[str, list[str]]] = []

    def run_others(done: int, *_: object) -> None:
        if done == 5:  # a second run begins, goes further than this one, and is killed
            with pytest.raises(Interrupted):
                train_saes(shared, [spec], checkpoint_every_steps=2, progress=_interrupt_at(11))
            attempts.append(_checkpoints(shared, spec))
        if done == 9:  # a third goes on from where the second was, and finishes
            train_saes(shared, [spec], checkpoint_every_steps=2, progress=lambda at, *_: third.append(at))
            attempts.append(_checkpoints(shared, spec))

    third: list[int] = []
    (record,) = train_saes(shared, [spec], checkpoint_every_steps=2, progress=run_others)
    # The second has superseded the checkpoints it began from; the first does not miss them.
    assert sorted(attempts[0].values()) == [["metrics.parquet", *_pairs(*at)] for at in ((), (8, 10))]
    assert third[0] == 11
    assert attempts[1] == {}
    assert _bytes(shared, record) == _bytes(storage, expected)
    assert _checkpoints(shared, spec) == {}


def test_training_draws_nothing_from_the_global_generator(storage: Storage, snapshot: Snapshot) -> None:
    before = torch.get_rng_state()
    train_saes(storage, _sweep(snapshot), checkpoint_every_steps=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_twice_gives_the_same_bytes_and_keeps_the_record(storage: Storage, snapshot: Snapshot) -> None:
    spec = _spec(snapshot)
    (first,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    (second,) = train_saes(storage, [spec], checkpoint_every_steps=5)
    assert first == second


def test_a_memory_root_works_the_same(
    memory_storage: Storage, storage: Storage, snapshot: Snapshot, make_snapshot: MakeSnapshot
) -> None:
    make_snapshot(memory_storage, _parts(), row_group_rows=20)
    spec = _spec(snapshot)
    with pytest.raises(Interrupted):
        train_saes(memory_storage, [spec], checkpoint_every_steps=3, progress=_interrupt_at(8))
    (there,) = train_saes(memory_storage, [spec], checkpoint_every_steps=3)
    (here,) = train_saes(storage, [spec], checkpoint_every_steps=3)
    assert _bytes(memory_storage, there) == _bytes(storage, here)


def test_the_seed_the_order_and_the_config_change_the_weights(storage: Storage, snapshot: Snapshot) -> None:
    specs = [_spec(snapshot), _spec(snapshot, seed=1), _spec(snapshot, lr=0.02)]
    other_order = specs[0].model_copy(update={"order_seed": 8})
    records = [
        *train_saes(storage, specs, checkpoint_every_steps=0),
        *train_saes(storage, [other_order], checkpoint_every_steps=0),
    ]
    assert len({record.content for record in records}) == 4


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_try_and_spares_the_others(
    storage: Storage, snapshot: Snapshot
) -> None:
    wild = _spec(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=1e30, init="default")
    with pytest.raises(TrainingError, match=r"stopped being finite at step \d+ of 20.*lower learning rate"):
        train_saes(storage, [wild, _spec(snapshot)], checkpoint_every_steps=2)
    assert read_record(storage, wild.ref) is None
    assert read_record(storage, _spec(snapshot).ref) is not None


def test_divergence_names_batch_rows_and_the_last_good_checkpoint(storage: Storage, snapshot: Snapshot) -> None:
    wild = _spec(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=100.0, init="default")
    with pytest.raises(TrainingError) as raised:
        train_saes(storage, [wild], checkpoint_every_steps=1)
    message = str(raised.value)
    found = re.search(r"step (\d+) of 20 \(batch (\d+) of epoch (\d+): rows (\d+) to (\d+) of its order\)", message)
    assert found, message
    step, batch, epoch, first, last = map(int, found.groups())
    assert step - 1 == 7 * epoch + batch
    assert (first, last) == (32 * batch, min(32 * batch + 32, ROWS) - 1)
    ((attempt, names),) = _checkpoints(storage, wild).items()
    newest = f"{layout.checkpoint_folder(wild.ref)}/{attempt}/{max(name for name in names if name.endswith('.json'))}"
    assert f"The last good checkpoint is {storage.uri(newest)}." in message
    assert int(newest[-13:-5]) < step
    with pytest.raises(TrainingError, match="There is no checkpoint before it"):
        train_saes(storage, [wild.model_copy(update={"order_seed": 1})], checkpoint_every_steps=0)


def test_one_line_tells_of_every_sae_of_a_sweep(storage: Storage, snapshot: Snapshot) -> None:
    notes: list[str] = []
    records = train_saes(
        storage,
        [_spec(snapshot), _spec(snapshot, seed=1)],
        checkpoint_every_steps=0,
        progress=lambda done, total, unit, note="": notes.append(note),
    )
    figures = dict(part.split(" ", 1) for part in notes[-1].split("; ")[1:])
    assert figures["fvu"].split() == [f"{record.metrics['fvu']:.3f}" for record in records]
    assert figures["l0"].split() == [f"{record.metrics['l0']:.3g}" for record in records]
    assert figures["dead"].split() == [f"{record.metrics['dead']:.0%}" for record in records]
    assert figures["loss"].split() == [f"{record.metrics['loss']:.3g}" for record in records]
    assert re.match(r"[\d,]+ tokens/s, waited \d+\.\d s for data; fvu", notes[-1])


def test_a_stop_does_not_hide_that_an_sae_has_diverged(
    storage: Storage, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    wild = _spec(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=1e30, init="default")
    specs = [wild, _spec(snapshot)]
    with pytest.raises(StopRequested, match=rf"at step 7 of 20, .*; {wild.ref} .*stopped being finite"):
        train_saes(storage, specs, checkpoint_every_steps=2, progress=_stop_at(7))
    assert len(caplog.records) == 1  # a diverged SAE is told once and trained no further
    with pytest.raises(TrainingError, match=f"{wild.ref} .*stopped being finite"):
        train_saes(storage, specs, checkpoint_every_steps=2)
    assert read_record(storage, _spec(snapshot).ref) is not None


def test_data_without_variance_is_refused(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    constant = make_snapshot(storage, [np.full((64, 3), 1.25, np.float32)])
    with pytest.raises(TrainingError, match="64 rows are all equal"):
        train_saes(storage, [_spec(constant)], checkpoint_every_steps=0)


def test_specs_that_do_not_share_their_batches_are_refused(storage: Storage, snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match="share snapshot, batch_rows and order_seed"):
        train_saes(storage, [_spec(snapshot), _spec(snapshot, batch_rows=16)], checkpoint_every_steps=0)
    with pytest.raises(ConfigError, match="twice"):
        train_saes(storage, [_spec(snapshot), _spec(snapshot)], checkpoint_every_steps=0)
    with pytest.raises(ConfigError, match="empty"):
        train_saes(storage, [], checkpoint_every_steps=0)


def test_a_missing_snapshot_is_a_store_error(storage: Storage, snapshot: Snapshot) -> None:
    spec = SAESpec(config=_spec(snapshot).config, snapshot="activations/" + "0" * 16, order_seed=0)
    with pytest.raises(StoreError, match="never finished"):
        train_saes(storage, [spec], checkpoint_every_steps=0)


def test_long_runs_log_a_bounded_number_of_points(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [_spec(snapshot, n_tokens=ROWS * 60)], checkpoint_every_steps=0)
    with local_files(storage, record) as folder:
        steps = pq.read_table(folder / "metrics.parquet")["step"].to_pylist()
    assert 100 <= len(steps) <= 300
    assert steps[-1] == 420
