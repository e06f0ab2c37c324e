"""Given activations whose answer is known: named concepts, their replicates, and true feature directions."""

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.architectures.base import SAE
from sae.evaluate.concepts import report_concepts
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.recovery import measure_recovery
from sae.evaluate.replicates import TrainReplicates, count_replicates
from sae.progress import Progress, silent
from sae.store.artefacts import records
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.train.config import TrainConfig

DIRECTIONS_FILE = "directions.safetensors"
"""True feature directions, a file of the part set of a superposition source."""
DIRECTIONS_NAME = "directions"
"""[n_features, d_in]"""
THIS_RECIPE = "this recipe"


def look_for_concepts(
    storage: Storage,
    spec: EvaluationSpec,
    sae: SAE,
    train_replicates: TrainReplicates | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any] | None:
    """Whether the SAE has a latent for every configured concept, and how often its recipe does from other seeds.

    Concepts are looked for in the training rows, which must fit into memory. Replicates are counted when the config
    asks for them and a way to train them is given.

    Returns: the content of concepts.json; None without configured concepts.
    """
    config = spec.config
    if not config.concepts:
        return None
    snapshot = read_snapshot(storage, spec.train_snapshot)
    x = rows_in_source_order(storage, snapshot)
    found: dict[str, Any] = {
        "labels": _row_labels(storage, snapshot),
        **report_concepts(sae, x.to(sae.W_enc.device), config.concepts).model_dump(mode="json"),
        "replicates": {},
    }
    if config.replicates is not None and train_replicates is not None:
        first = config.replicates.first_seed
        seeds = range(first, first + config.replicates.n_seeds)
        recipes = {THIS_RECIPE: _recipe(storage, spec.sae)} | config.replicates.others
        for name, recipe in recipes.items():
            counts = count_replicates(x, recipe, config.concepts, seeds, train_replicates, progress)
            found["replicates"][name] = counts.model_dump(mode="json")
    return found


def compare_to_true_features(storage: Storage, sae: SAE, snapshot: Snapshot, seed: int) -> dict[str, Any] | None:
    """How many of the true features the decoder holds; None where they are not known."""
    record = records.require_record(storage, snapshot.parts[0].ref)
    if not any(entry.name == DIRECTIONS_FILE for entry in record.files):
        return None
    with records.local_files(storage, record) as folder:
        directions = load_file(folder / DIRECTIONS_FILE)[DIRECTIONS_NAME]
    return measure_recovery(directions, sae.W_dec.cpu(), seed).model_dump(mode="json")


def rows_in_source_order(storage: Storage, snapshot: Snapshot) -> Tensor:
    """All rows of given activations, in the order of their source. [rows, d_in] float32"""
    blocks = [(block.seq.copy(), block.act.astype(np.float32)) for block in iter_rows(storage, snapshot)]
    order = np.argsort(np.concatenate([seq for seq, _ in blocks]), kind="stable")
    return torch.from_numpy(np.concatenate([act for _, act in blocks])[order])


def _recipe(storage: Storage, sae: str) -> TrainConfig:
    return TrainConfig.model_validate(records.require_record(storage, sae).spec["config"])


def _row_labels(storage: Storage, snapshot: Snapshot) -> list[str] | None:
    part = snapshot.parts[0]
    labels = records.require_record(storage, part.ref, part.part).spec.get("source", {}).get("labels")
    return list(labels) if labels else None
