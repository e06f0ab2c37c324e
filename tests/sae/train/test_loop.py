"""A sweep trained from the store: what it makes, that it is repeatable, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures import StandardConfig
from sae.errors import ConfigError, StoreError, TrainingError
from sae.metrics import ReconstructionSums
from sae.store import layout
from sae.store.artefacts.records import local_files, read_record
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.config import SAESpec
from sae.train.curve import COLUMNS
from sae.train.loop import train_saes
from sae.weights import load_sae
from tests.sae.train.sweeps import (
    D_IN,
    ROWS,
    Interrupted,
    MakeSnapshot,
    checkpoints_of,
    file_bytes,
    fresh_root,
    interrupt_at,
    parts_of_rows,
    spec_of,
    sweep_of,
)


def test_the_artefact_has_weights_config_and_curve(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [spec_of(snapshot)], checkpoint_every_steps=3)
    assert [entry.name for entry in record.files] == ["cfg.json", "metrics.parquet", "sae.safetensors"]
    assert record == read_record(storage, spec_of(snapshot).ref)
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
    spec = spec_of(snapshot, n_tokens=10_000, dead_after_tokens=1000)
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
    (record,) = train_saes(storage, [spec_of(snapshot, n_tokens=None)], checkpoint_every_steps=0)
    assert (record.metrics["n_tokens"], record.metrics["n_steps"]) == (ROWS, 7)


def test_each_sae_of_a_sweep_equals_the_one_trained_alone(
    storage: Storage, snapshot: Snapshot, tmp_path: Path, make_snapshot: MakeSnapshot
) -> None:
    specs = sweep_of(snapshot)
    together = train_saes(storage, specs, checkpoint_every_steps=4)
    alone_storage, _ = fresh_root(tmp_path, "alone", make_snapshot)
    for spec, record in zip(specs, together, strict=True):
        (alone,) = train_saes(alone_storage, [spec], checkpoint_every_steps=0)
        assert alone.ref == record.ref == spec.ref
        assert file_bytes(alone_storage, alone) == file_bytes(storage, record)
        assert alone.metrics == record.metrics


def test_training_draws_nothing_from_the_global_generator(storage: Storage, snapshot: Snapshot) -> None:
    before = torch.get_rng_state()
    train_saes(storage, sweep_of(snapshot), checkpoint_every_steps=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_twice_gives_the_same_bytes_and_keeps_the_record(storage: Storage, snapshot: Snapshot) -> None:
    spec = spec_of(snapshot)
    (first,) = train_saes(storage, [spec], checkpoint_every_steps=0)
    (second,) = train_saes(storage, [spec], checkpoint_every_steps=5)
    assert first == second


def test_a_memory_root_works_the_same(
    memory_storage: Storage, storage: Storage, snapshot: Snapshot, make_snapshot: MakeSnapshot
) -> None:
    make_snapshot(memory_storage, parts_of_rows(), row_group_rows=20)
    spec = spec_of(snapshot)
    with pytest.raises(Interrupted):
        train_saes(memory_storage, [spec], checkpoint_every_steps=3, progress=interrupt_at(8))
    (there,) = train_saes(memory_storage, [spec], checkpoint_every_steps=3)
    (here,) = train_saes(storage, [spec], checkpoint_every_steps=3)
    assert file_bytes(memory_storage, there) == file_bytes(storage, here)


def test_the_seed_the_order_and_the_config_change_the_weights(storage: Storage, snapshot: Snapshot) -> None:
    specs = [spec_of(snapshot), spec_of(snapshot, seed=1), spec_of(snapshot, lr=0.02)]
    other_order = specs[0].model_copy(update={"order_seed": 8})
    records = [
        *train_saes(storage, specs, checkpoint_every_steps=0),
        *train_saes(storage, [other_order], checkpoint_every_steps=0),
    ]
    assert len({record.content for record in records}) == 4


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_try_and_spares_the_others(
    storage: Storage, snapshot: Snapshot
) -> None:
    wild = spec_of(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=1e30, init="default")
    with pytest.raises(TrainingError, match=r"stopped being finite at step \d+ of 20.*lower learning rate"):
        train_saes(storage, [wild, spec_of(snapshot)], checkpoint_every_steps=2)
    assert read_record(storage, wild.ref) is None
    assert read_record(storage, spec_of(snapshot).ref) is not None


def test_divergence_names_batch_rows_and_the_last_good_checkpoint(storage: Storage, snapshot: Snapshot) -> None:
    wild = spec_of(snapshot, sae=StandardConfig(d_sae=9, l1_coefficient=0.1, decoder="free"), lr=100.0, init="default")
    with pytest.raises(TrainingError) as raised:
        train_saes(storage, [wild], checkpoint_every_steps=1)
    message = str(raised.value)
    found = re.search(r"step (\d+) of 20 \(batch (\d+) of epoch (\d+): rows (\d+) to (\d+) of its order\)", message)
    assert found, message
    step, batch, epoch, first, last = map(int, found.groups())
    assert step - 1 == 7 * epoch + batch
    assert (first, last) == (32 * batch, min(32 * batch + 32, ROWS) - 1)
    ((attempt, names),) = checkpoints_of(storage, wild).items()
    newest = f"{layout.checkpoint_folder(wild.ref)}/{attempt}/{max(name for name in names if name.endswith('.json'))}"
    assert f"The last good checkpoint is {storage.uri(newest)}." in message
    assert int(newest[-13:-5]) < step
    with pytest.raises(TrainingError, match="There is no checkpoint before it"):
        train_saes(storage, [wild.model_copy(update={"order_seed": 1})], checkpoint_every_steps=0)


def test_one_line_tells_of_every_sae_of_a_sweep(storage: Storage, snapshot: Snapshot) -> None:
    notes: list[str] = []
    records = train_saes(
        storage,
        [spec_of(snapshot), spec_of(snapshot, seed=1)],
        checkpoint_every_steps=0,
        progress=lambda done, total, unit, note="": notes.append(note),
    )
    figures = dict(part.split(" ", 1) for part in notes[-1].split("; ")[1:])
    assert figures["fvu"].split() == [f"{record.metrics['fvu']:.3f}" for record in records]
    assert figures["l0"].split() == [f"{record.metrics['l0']:.3g}" for record in records]
    assert figures["dead"].split() == [f"{record.metrics['dead']:.0%}" for record in records]
    assert figures["loss"].split() == [f"{record.metrics['loss']:.3g}" for record in records]
    assert re.match(r"[\d,]+ tokens/s, waited \d+\.\d s for data; fvu", notes[-1])


def test_data_without_variance_is_refused(storage: Storage, make_snapshot: MakeSnapshot) -> None:
    constant = make_snapshot(storage, [np.full((64, 3), 1.25, np.float32)])
    with pytest.raises(TrainingError, match="64 rows are all equal"):
        train_saes(storage, [spec_of(constant)], checkpoint_every_steps=0)


def test_specs_that_do_not_share_their_batches_are_refused(storage: Storage, snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match="share snapshot, batch_rows and order_seed"):
        train_saes(storage, [spec_of(snapshot), spec_of(snapshot, batch_rows=16)], checkpoint_every_steps=0)
    with pytest.raises(ConfigError, match="twice"):
        train_saes(storage, [spec_of(snapshot), spec_of(snapshot)], checkpoint_every_steps=0)
    with pytest.raises(ConfigError, match="empty"):
        train_saes(storage, [], checkpoint_every_steps=0)


def test_a_missing_snapshot_is_a_store_error(storage: Storage, snapshot: Snapshot) -> None:
    spec = SAESpec(config=spec_of(snapshot).config, snapshot="activations/" + "0" * 16, order_seed=0)
    with pytest.raises(StoreError, match="never finished"):
        train_saes(storage, [spec], checkpoint_every_steps=0)


def test_long_runs_log_a_bounded_number_of_points(storage: Storage, snapshot: Snapshot) -> None:
    (record,) = train_saes(storage, [spec_of(snapshot, n_tokens=ROWS * 60)], checkpoint_every_steps=0)
    with local_files(storage, record) as folder:
        steps = pq.read_table(folder / "metrics.parquet")["step"].to_pylist()
    assert 100 <= len(steps) <= 300
    assert steps[-1] == 420
