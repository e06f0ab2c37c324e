"""What is measured with an SAE and its subject on another device than the CPU equals what the CPU measures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sae.architectures.config import BatchTopKConfig, TopKConfig
from sae.evaluate.config import EvaluationConfig, EvaluationSpec
from sae.evaluate.evaluate import evaluate_sae
from sae.statistics.config import StatisticsConfig, StatisticsSpec
from sae.statistics.statistics import count_parts, merge_statistics, statistics_of_part
from sae.store.artefacts.records import Record, local_files
from sae.store.storage.filesystem import Storage
from tests.sae.conftest import HOOK_POINT, World


@pytest.fixture(params=[TopKConfig(d_sae=16, k=3), BatchTopKConfig(d_sae=16, k=3)], ids=lambda sae: sae.architecture)
def world_with_model(
    make_world: Callable[..., World], pin_one_layer_model: Callable[[Storage], str], tmp_path: Path, request: Any
) -> tuple[World, str]:
    """A store with text, an SAE, and the model that it is of."""
    root = str(tmp_path / "store")
    subject = pin_one_layer_model(Storage(root))
    return make_world(n_train=20, n_heldout=12, d_in=12, sae_config=request.param, subject=subject, root=root), subject


def files_of(storage: Storage, record: Record) -> dict[str, Any]:
    with local_files(storage, record) as folder:
        return {
            path.name: json.loads(path.read_text()) if path.suffix == ".json" else pq.read_table(path).to_pylist()
            for path in sorted(folder.iterdir())
        }


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal, numbers up to rounding."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_alike(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(one, other, f"{where}[{i}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), where
    else:
        assert ours == theirs, where


def test_evaluations_are_alike(world_with_model: tuple[World, str], device: torch.device, tmp_path: Path) -> None:
    world, subject = world_with_model
    spec = EvaluationSpec(
        config=EvaluationConfig(n_contexts=10, n_bootstrap=50, min_fires=5, n_probe_rows=60, untrained=None),
        sae=world.sae_ref,
        architecture=world.sae.config,
        train_snapshot=world.snapshots["train"],
        heldout_snapshot=world.snapshots["heldout"],
        tokens=world.tokens,
        subject=subject,
        hook_point=HOOK_POINT,
        seed=0,
    )
    found = []
    for where in ("cpu", device):
        record = evaluate_sae(world.storage, spec, device=where)
        found.append(files_of(world.storage, record))
        world.storage.remove(f"{spec.ref}/record.json")
    assert found[0]["evaluation.json"]["ce"]["controls"].keys() == {"neurons", "pca", "random"}
    assert_alike(*found)


def test_statistics_are_alike(world_with_model: tuple[World, str], device: torch.device) -> None:
    world, subject = world_with_model
    spec = StatisticsSpec(
        config=StatisticsConfig(n_top=3, n_samples=16, n_per_group=2, context_tokens=5, n_neighbours=3),
        sae=world.sae_ref,
        snapshots=world.snapshots,
        tokens=world.tokens,
        subject=subject,
        hook_point=HOOK_POINT,
        seed=0,
    )
    found = []
    for where in ("cpu", device):
        for part in range(count_parts(world.storage, spec)):
            statistics_of_part(world.storage, spec, part, device=where)
        record = merge_statistics(world.storage, spec, device=where)
        found.append(files_of(world.storage, record))
        for part in range(count_parts(world.storage, spec)):
            world.storage.remove(f"{spec.ref}/part-{part:05d}.json")
        world.storage.remove(f"{spec.ref}/record.json")
    assert found[0]["latents.parquet"][0]["logits_up"]
    assert_alike(*found)
