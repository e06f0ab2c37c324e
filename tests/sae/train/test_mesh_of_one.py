"""The way of a mesh, taken by one process: over gloo, and over NCCL where there is a GPU."""

from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from sae.store.artefacts.records import local_files
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train.collectives import ALONE, Collectives
from sae.train.loop import train_saes
from sae.train.mesh import Mesh, MeshConfig
from sae.weights import load_sae
from tests.sae.conftest import CUDA
from tests.sae.train.ranks import environment
from tests.sae.train.sweeps import MakeSnapshot, fresh_root, sweep_of


class OnDevice(NamedTuple):
    mesh: Mesh
    device: torch.device


@pytest.fixture(params=["cpu", CUDA])
def alone_in_a_mesh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDevice]:
    """`connect` gives one process no mesh, so here it is made as `connect` does for more."""
    for name, value in (environment(world=1) | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo" if request.param == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield OnDevice(Mesh(MeshConfig(), timedelta(seconds=60)), torch.device(request.param))
    finally:
        dist.destroy_process_group()


def trained(storage: Storage, snapshot: Snapshot, device: torch.device, shared: Collectives) -> list[dict]:
    weights = []
    for record in train_saes(storage, sweep_of(snapshot)[::5], checkpoint_every_steps=7, device=device, shared=shared):
        with local_files(storage, record) as folder:
            weights.append(load_sae(folder).state_dict())
    return weights


def test_it_ends_with_the_weights_of_one_without_a_mesh(
    tmp_path, make_snapshot: MakeSnapshot, alone_in_a_mesh: OnDevice
) -> None:
    mesh, device = alone_in_a_mesh
    expected = trained(*fresh_root(tmp_path, "alone", make_snapshot), device, ALONE)
    found = trained(*fresh_root(tmp_path, "mesh", make_snapshot), device, mesh)
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in theirs.items():
            rounding = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(ours[name], tensor, **rounding, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_what_is_told_travels_in_every_dtype(alone_in_a_mesh: OnDevice, dtype: torch.dtype) -> None:
    """A mesh of one leaves most of it out, so what it would call is called here."""
    mesh, device = alone_in_a_mesh
    rows = torch.arange(12, device=device).to(dtype).view(4, 3)
    assert torch.equal(mesh.from_first(rows.clone()), rows)
    assert torch.equal(mesh.to_first(rows), rows)
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        summed = rows.clone()
        dist.all_reduce(summed, op)
        assert torch.equal(summed, rows)
    gathered = [torch.empty_like(rows)]
    dist.gather(rows, gathered, 0)
    assert torch.equal(gathered[0], rows)
