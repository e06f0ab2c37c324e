"""Sweeps that are trained on meshes, broken off and gone on with. Called in every rank, and for one alone."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.architectures import BatchTopKConfig, StandardConfig
from sae.architectures.config import Resampling
from sae.errors import StopRequested, TransientError
from sae.progress import Progress, silent
from sae.store.artefacts.checkpoint_files import CheckpointFiles, Pointer, Saved
from sae.store.artefacts.records import local_files
from sae.store.reading.loader import Loader
from sae.store.reading.order import Cursor
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.train.config import MeshConfig, SAESpec
from sae.train.loop import train_saes
from sae.train.mesh import Mesh
from sae.train.reading import SharedLoader
from sae.train.rows import SnapshotRows
from sae.train.run import TrainingRun
from sae.weights import load_sae
from tests.conftest import write_snapshot
from tests.sae.train.sweeps import BATCH, Interrupted, parts_of_rows, spec_of, stop_at

Shape = tuple[int, int]
A, B, C, ONE = (2, 2), (1, 4), (4, 1), None
SHAPES: dict[int, list[Shape]] = {2: [(1, 2), (2, 1)], 4: [A, B, C]}
HOPS: dict[int, list[tuple[Shape | None, Shape | None]]] = {
    2: [((1, 2), (1, 2)), ((1, 2), (2, 1)), (ONE, (2, 1)), ((2, 1), ONE)],
    4: [(A, A), (B, B), (C, C), (A, B), (B, C), (C, A), (A, ONE), (ONE, B), (C, ONE)],
}
"""On which mesh a run is broken off, and on which it goes on. ONE: in one process."""
STOP_AT = 9


def specs_of(snapshot: Snapshot) -> list[SAESpec]:
    resampled = StandardConfig(
        d_sae=32, l1_coefficient=3, resampling=Resampling(every_steps=4, silent_tokens=60, n_inputs=100)
    )
    free = StandardConfig(d_sae=16, l1_coefficient=2, decoder="free", l1_warmup_fraction=0.5)
    return [
        spec_of(snapshot, max_grad_norm=0.1, ema_decay=0.9),
        spec_of(snapshot, sae=BatchTopKConfig(d_sae=16, k=2, k_aux=4), init="density"),
        spec_of(snapshot, sae=resampled, init="kaiming", ema_decay=0.9),
        spec_of(snapshot, sae=free, init="default", input_scale="sqrt_d"),
    ]


def new_root(path: Path) -> Storage:
    storage = Storage(str(path))
    write_snapshot(storage, parts_of_rows(), row_group_rows=20)
    return storage


def snapshot_of(root: Path) -> Snapshot:
    """Roots are copies of one: the address is the same in all."""
    storage = Storage(str(root))
    (fingerprint,) = storage.list("activations")
    return read_snapshot(storage, f"activations/{fingerprint}")


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Runs compute in float64, where another order of summation is seen by less than 1e-12."""
    advance, read = TrainingRun.advance, SnapshotRows._read
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(TrainingRun, "advance", lambda run, x, *rest: advance(run, x.double(), *rest)),
            mock.patch.object(SnapshotRows, "_read", lambda *args: (batch.double() for batch in read(*args))),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def train(
    root: Path, shared: Collectives = ALONE, stop: bool = False, every: int = 100, progress: Progress = silent
) -> dict[str, Tensor]:
    """The SAEs' weights and final figures; `stop`: where the last rank is asked to stop, and nothing more."""
    storage = Storage(str(root))
    specs = specs_of(snapshot_of(root))
    done: list[int] = []
    stopping = stop_at(STOP_AT) if stop and shared.rank == shared.world - 1 else silent

    def watch(step: int, total: int, unit: str, note: str = "") -> None:
        done.append(step)
        stopping(step, total, unit)
        progress(step, total, unit)

    with in_float64():
        try:
            records = train_saes(storage, specs, checkpoint_every_steps=every, progress=watch, shared=shared)
        except StopRequested as err:
            if not stop or f"at step {STOP_AT} of 20" not in str(err):
                raise
            return {}
    assert not stop
    found = {"first step": torch.tensor(done[0])}
    for i, record in enumerate(records):
        with local_files(storage, record) as folder:
            sae = load_sae(folder)
        found |= {f"{i} {name}": parameter for name, parameter in sae.named_parameters()}
        metrics = [float(record.metrics[name]) for name in ("loss", "fvu", "l0", "dead", "n_tokens")]
        found[f"{i} metrics"] = torch.tensor(metrics, dtype=torch.float64)
        if hasattr(sae, "threshold"):
            found[f"{i} threshold"] = sae.threshold
    return found


def go_on_from_a_torn_save(root: Path, shared: Collectives) -> dict[str, Tensor]:
    """The first rank fails when all parts of step 8 are there, and no pointer; the next run goes on from step 4."""
    write = CheckpointFiles.write_pointer

    def fail(files: CheckpointFiles, saved: Saved, pointer: Pointer) -> None:
        if saved.step == 8:
            raise Interrupted
        write(files, saved, pointer)

    error = Interrupted if shared.rank == 0 else TransientError
    with mock.patch.object(CheckpointFiles, "write_pointer", fail), pytest.raises(error):
        train(root, shared, every=4)
    return train(root, shared)


def go_on_while_a_rank_writes_late(root: Path, shared: Collectives) -> dict[str, Tensor]:
    """The last rank writes its part of step 4 in step 7, so that no rank lets it count before."""
    may_write, write = threading.Event(), CheckpointFiles.write_tensors

    def write_late(files: CheckpointFiles, path: str, tensors: Mapping[str, Tensor]) -> str:
        assert shared.rank < shared.world - 1 or may_write.wait(30)
        return write(files, path, tensors)

    def progress(step: int, *_: object) -> None:
        assert step >= 8 or not [*root.glob("saes/*/checkpoints/*/*.json")]
        if step == 7:
            may_write.set()
        if step == 12:
            assert [*root.glob("saes/*/checkpoints/*/step-00000004.json")]

    with mock.patch.object(CheckpointFiles, "write_tensors", write_late):
        return train(root, shared, every=4, progress=progress)


def go_on_from_a_damaged_part(root: Path, shared: Collectives) -> dict[str, Tensor]:
    """A bit of the last rank's part is another: no rank goes on from that step, but all from the one before."""
    train(root, shared, stop=True, every=4)

    def damage() -> None:
        for part in root.glob(f"saes/*/checkpoints/*/step-{STOP_AT:08d}.part-{shared.world - 1:05d}.safetensors"):
            data = bytearray(part.read_bytes())
            data[-1] ^= 1
            part.write_bytes(data)

    shared.once(damage)
    return train(root, shared)


@contextlib.contextmanager
def counting_bytes_read() -> Iterator[list[int]]:
    """The sizes of the row groups whose vectors are read from storage meanwhile, by any thread."""
    n_bytes: list[int] = []
    vectors = RowGroupReader._vectors

    def counted(reader: RowGroupReader, part: int, group: int, out: np.ndarray) -> object:
        n_bytes.append(int(reader._snapshot.group_rows(part)[group]) * reader._row_bytes)
        return vectors(reader, part, group, out)

    with mock.patch.object(RowGroupReader, "_vectors", counted):
        yield n_bytes


def rows_are_as_read_alone(root: Path, shared: Mesh) -> None:
    """Those of batches, short ones and from a cursor too; and where every rank is on a host of its own, and reads."""
    storage, cpu, cursor = Storage(str(root)), torch.device("cpu"), Cursor(epoch=0, batch=4)
    place = {"rank": shared.data_rank, "world": shared.n_data}
    open_loader = partial(Loader, storage, snapshot_of(root), BATCH, 7, cursor, **place)
    with mock.patch("platform.node", return_value=f"host {shared.rank}"):
        apart = Mesh(MeshConfig(data=shared.n_data, latents=shared.n_latent), timedelta(seconds=60))
    assert apart.same_batch.reads
    assert apart.same_host.reads
    assert shared.same_host.reads == (shared.rank == 0)
    assert shared.same_batch.reads == (shared.latent_rank == 0)
    alone = open_loader()
    told = [SharedLoader(open_loader, mesh.same_batch, cpu, cursor) for mesh in (shared, apart)]
    for _ in range(10):
        x = next(alone)
        for loader in told:
            assert loader.cursor == cursor
            assert torch.equal(next(loader), x)
            assert (loader.cursor, loader.n_rows) == (alone.cursor, alone.n_rows)
        cursor = alone.cursor
    for loader in (alone, *told):
        loader.close()


def all_runs(folder: Path) -> dict[str, Tensor]:
    """In the roots that lie in the folder: whole on every mesh, and what there is to do of every hop."""
    world = torch.distributed.get_world_size()
    meshes = {
        shape: Mesh(MeshConfig(data=shape[0], latents=shape[1]), timedelta(seconds=60)) for shape in SHAPES[world]
    }
    found = {}
    for shape, mesh in meshes.items():
        rows_are_as_read_alone(folder / "alone", mesh)
        with counting_bytes_read() as n_bytes:
            found |= {f"{shape}: {n}": t for n, t in train(folder / f"{shape}", mesh, every=7).items()}
        found[f"{shape}: bytes read"] = torch.tensor(sum(n_bytes))
    mesh = meshes[SHAPES[world][0]]
    found |= {f"torn: {n}": t for n, t in go_on_from_a_torn_save(folder / "torn", mesh).items()}
    found |= {f"damaged: {n}": t for n, t in go_on_from_a_damaged_part(folder / "damaged", mesh).items()}
    found |= {f"late: {n}": t for n, t in go_on_while_a_rank_writes_late(folder / "late", mesh).items()}
    for of, to in HOPS[world]:
        if of:
            train(folder / f"{of} to {to}", meshes[of], stop=True)
        if to:
            found |= {f"{of} to {to}: {n}": t for n, t in train(folder / f"{of} to {to}", meshes[to]).items()}
    return found
