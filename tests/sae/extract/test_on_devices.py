"""The subject on another device than the CPU: training it, and its activations on their way into parts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.extract.part import plan_parts
from sae.extract.part_group import extract_group
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from sae.subject.embedded import train_embedded_lm
from tests.sae.extract.conftest import MakeWorld
from tests.sae.extract.test_part import read_part


def test_activations_of_a_device_are_stored_as_those_of_the_cpu(
    make_world: MakeWorld, device: torch.device, tmp_path: Path
) -> None:
    kept = []
    for where in ("cpu", device):
        world = make_world(packing=False, root=Storage(str(tmp_path / str(where))))
        storage = world.storage
        specs = [world.parts(), world.parts(hook_point="gpt_neox.layers.0:input", dtype="float32")]
        n_parts = [plan_parts(storage, spec).metrics["n_parts"] for spec in specs]
        extract_group(storage, specs, [(0, n) for n in n_parts], device=where)
        records = [
            require_record(storage, spec.ref, part) for spec, n in zip(specs, n_parts, strict=True) for part in range(n)
        ]
        kept.append([read_part(storage, record) for record in records])
    for ours, theirs in zip(*kept, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ("seq", "pos", "token"))
        np.testing.assert_allclose(ours["act"], theirs["act"], rtol=2e-3, atol=1e-4)


def test_a_subject_trained_on_a_device_is_that_of_the_cpu(
    make_world: MakeWorld, device: torch.device, tmp_path: Path
) -> None:
    weights = []
    for where in ("cpu", device):
        world = make_world(root=Storage(str(tmp_path / str(where))))
        config = world.subject.config.model_dump() | {"n_steps": 6, "batch_contexts": 4, "warmup_steps": 1}
        spec = world.subject.model_validate(world.subject.model_dump() | {"config": config})
        record = train_embedded_lm(world.storage, spec, checkpoint_every_steps=2, device=where)
        weights.append(float(record.metrics["heldout_loss"]))
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
    assert weights[0] < 0.99 * np.log(300), "nothing was learned, so nothing was compared"
