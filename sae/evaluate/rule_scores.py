"""The interpretability scores of latents and their controls as figures and tables."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sae.evaluate.config import EvaluationSpec
from sae.evaluate.controls import Control, ControlFindings
from sae.evaluate.interpretability import DEFINITIONS, Names, UnitScores, score_units, scores_table, summarize
from sae.evaluate.neurons import score_neurons
from sae.evaluate.reconstruction import Reconstruction
from sae.progress import Progress
from sae.store.artefacts import records
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.subject.load import Subject
from sae.subject.text import printable, token_bytes

TABLES = {"latents": "interpretability.parquet", "neurons": "neurons.parquet"}
"""Units whose scores are also kept one by one."""


def write_rule_scores(
    storage: Storage,
    spec: EvaluationSpec,
    subject: Subject,
    snapshot: Snapshot,
    found: Reconstruction,
    controls: dict[str, Control],
    control_found: ControlFindings,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write the tables of scores into `folder`; returns the part of evaluation.json that sums them up."""
    texts = found.texts
    assert texts is not None, "scores are of rows with text"
    min_fires = spec.config.min_fires
    labels = records.require_record(storage, spec.tokens[0]).metrics.get("label_names")
    names = Names(lambda ids: [printable(name) for name in token_bytes(subject.tokenizer, ids.tolist())], labels)
    scores: dict[str, UnitScores] = {
        "latents": score_units(found.firings, found.counts.d_sae, texts, progress=progress),
        "neurons": score_neurons(storage, snapshot, texts),
    }
    for name, file in TABLES.items():
        pq.write_table(scores_table(scores[name], min_fires, names), folder / file, compression="zstd")
    for name, firings in control_found.firings.items():
        scores[name] = score_units(firings, controls[name].n_units, texts, progress=progress)
    return {
        "n_rows": len(texts),
        "min_fires": min_fires,
        "definitions": {name: definition.describe() for name, definition in DEFINITIONS.items()},
        "units": (
            f"Units that fire (are positive) at least {min_fires} times on the measured rows. Neurons are the "
            f"dimensions of {spec.hook_point} themselves. A principal component is two units, one per side, which "
            f"fire on the rows that keep it, as random directions do: as many per row as the SAE has latents."
        ),
        **{name: summarize(unit_scores, min_fires) for name, unit_scores in scores.items()},
    }
