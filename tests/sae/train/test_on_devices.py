"""Training on another device than the CPU: every architecture, initialisation and option, and what is kept of it."""

from collections.abc import Sequence

import pytest
import torch

from sae.architectures import StandardConfig, TopKConfig
from sae.device import CPU, prepare
from sae.errors import StopRequested
from sae.store.artefacts.records import local_files
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.train.config import TrainConfig
from sae.train.in_memory import train_in_memory, train_replicates
from sae.train.loop import train_saes
from sae.weights import load_sae
from tests.sae.train.sweeps import MakeSnapshot, fresh_root, parts_of_rows, spec_of, stop_at, sweep_of

N_TOKENS = 320
"""Ten steps: AuxK begins after three, latents are resampled after four and eight."""


def trained(
    storage: Storage,
    snapshot: Snapshot,
    device: torch.device | str,
    before: Sequence[tuple[int, torch.device | str]] = (),
) -> list[dict]:
    """The weights of a sweep.

    Args:
        before: up to which steps it was trained on which devices, and stopped.
    """
    specs = [*sweep_of(snapshot), spec_of(snapshot, seed=2, selection="bfloat16")]
    specs = [
        spec.model_validate(spec.model_dump() | {"config": spec.config.model_dump() | {"n_tokens": N_TOKENS}})
        for spec in specs
    ]
    for step, where in before:
        with pytest.raises(StopRequested):
            train_saes(storage, specs, checkpoint_every_steps=3, device=where, progress=stop_at(step))
    found = train_saes(storage, specs, checkpoint_every_steps=3, device=device)
    weights = []
    for record in found:
        with local_files(storage, record) as folder:
            weights.append(load_sae(folder).state_dict())
    return weights


def test_a_sweep_ends_with_the_same_weights_on_every_device(
    tmp_path, make_snapshot: MakeSnapshot, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.train.run.probe_library", lambda device: "blas")  # as there is no other one on a device
    monkeypatch.setattr("sae.train.curve.N_POINTS", 5)  # so that checkpoints are written between two
    expected = trained(*fresh_root(tmp_path, "cpu", make_snapshot), "cpu")
    found = trained(*fresh_root(tmp_path, "device", make_snapshot), device, [(5, device), (8, "cpu")])
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in theirs.items():
            rounding = {"rtol": 0, "atol": 0} if device.type == "pretend" else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(ours[name], tensor, **rounding, msg=lambda text, name=name: f"{name}: {text}")


def test_a_device_gives_the_same_bits_also_when_it_was_stopped(
    tmp_path, make_snapshot: MakeSnapshot, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.train.curve.N_POINTS", 5)
    prepare(device)
    try:
        expected = trained(*fresh_root(tmp_path, "once", make_snapshot), device)
        found = trained(*fresh_root(tmp_path, "stopped", make_snapshot), device, [(5, device), (8, device)])
    finally:
        prepare(CPU)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_rows_in_memory_are_trained_on_where_they_are(device: torch.device) -> None:
    x = torch.from_numpy(parts_of_rows()[0])
    for sae in (TopKConfig(d_sae=16, k=2, k_aux=4), StandardConfig(d_sae=8, l1_coefficient=0.1)):
        config = TrainConfig(sae=sae, batch_rows=len(x), n_tokens=10 * len(x), lr=0.01, auxk_after_tokens=200)
        ours, theirs = train_in_memory(x.to(device), config), train_in_memory(x, config)
        torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-4, atol=1e-4)
        for one, other in zip(
            train_replicates(x.to(device), config, (1, 2)), train_replicates(x, config, (1, 2)), strict=True
        ):
            torch.testing.assert_close(one.W_enc, other.W_enc, rtol=1e-4, atol=1e-4)
