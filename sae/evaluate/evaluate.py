"""The evaluation of one SAE on held-out documents: the order of the measurements, and what is committed."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from sae.architectures.base import SAE
from sae.evaluate.breakdown import Grouping, by_frequency, by_label, by_position
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.controls import control_figures, make_controls, measure_controls
from sae.evaluate.geometry import decoder_geometry
from sae.evaluate.known_answers import compare_to_true_features, look_for_concepts
from sae.evaluate.probe_figures import write_probes
from sae.evaluate.reconstruction import measure_reconstruction, reconstruction_figures
from sae.evaluate.replicates import TrainReplicates
from sae.evaluate.rows import count_tokens
from sae.evaluate.rule_scores import write_rule_scores
from sae.evaluate.splicing import cross_entropy_figures
from sae.progress import Progress, silent
from sae.store.artefacts import records
from sae.store.artefacts.records import Record
from sae.store.snapshots.snapshot import Snapshot, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.subject.load import load_subject
from sae.weights import load_sae

MAX_SCORED_ROWS = 1 << 19
"""Rows whose firings are kept, and rows the controls are measured on: the first of the snapshot, whose order is
random."""


def evaluate_sae(
    storage: Storage,
    spec: EvaluationSpec,
    *,
    sae: SAE | None = None,
    train_replicates: TrainReplicates | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Record:
    """Measure one SAE and commit evaluation.json with its tables.

    Rows are held out when there are such rows, else those of training; `split` says which. Without text there is no
    cross-entropy, no error by position or token class, no interpretability score and no probe: those are null.

    Args:
        sae: that of the spec, in float32; None: it is read.
        device: where subject and controls are, and the SAE that is read; one that is given may be elsewhere.
    """
    started = time.perf_counter()
    snapshot = read_snapshot(storage, spec.heldout_snapshot or spec.train_snapshot)
    train = read_snapshot(storage, spec.train_snapshot)
    if sae is None:
        with records.local_files(storage, records.require_record(storage, spec.sae)) as folder:
            sae = load_sae(folder).float().to(device)
    keep_rows = MAX_SCORED_ROWS if spec.tokens else 0
    groupings = _groupings(storage, spec, snapshot)
    found = measure_reconstruction(storage, sae, snapshot, keep_rows, groupings, progress=progress)
    l0 = found.counts.l0
    controls = make_controls(storage, train, l0, sae.d_sae, spec.seed, device)
    control_found = measure_controls(storage, controls, snapshot, MAX_SCORED_ROWS, keep_rows, progress=progress)
    evaluation: dict[str, Any] = {
        "n_rows": found.sums.n_rows,
        "split": "train" if spec.heldout_snapshot is None else "heldout",
        **reconstruction_figures(spec, sae, found),
        "controls": control_figures(control_found, l0),
        "geometry": decoder_geometry(sae, spec.seed),
        "ce": None,
        "interpretability": None,
        "probing": None,
        "superposition": compare_to_true_features(storage, sae, snapshot, spec.seed),
    }
    with storage.staging() as folder:
        if spec.subject is not None:
            subject = load_subject(storage, spec.subject, device)
            if subject.causal:
                evaluation["ce"] = cross_entropy_figures(storage, spec, subject, sae, train, controls, progress)
            about = (storage, spec, subject, snapshot, found, controls, control_found, folder)
            evaluation["interpretability"] = write_rule_scores(*about, progress)
            if spec.config.n_probe_rows:
                with torch.inference_mode():
                    evaluation["probing"] = write_probes(*about, progress)
        else:
            concepts = look_for_concepts(storage, spec, sae, train_replicates, progress=progress)
            if concepts is not None:
                _write_json(folder / "concepts.json", concepts)
        evaluation = _finite(evaluation)
        _write_json(folder / "evaluation.json", evaluation)
        seconds = time.perf_counter() - started
        return records.commit(storage, spec, folder, _headline(evaluation), seconds=seconds, device=device)


def _groupings(storage: Storage, spec: EvaluationSpec, snapshot: Snapshot) -> list[Grouping]:
    """By what the error is divided: syntax labels where every corpus has the same, else the tokens' frequency."""
    if not spec.tokens:
        return []
    tables = [records.require_record(storage, ref) for ref in spec.tokens]
    names: list[str] = tables[0].metrics.get("label_names") or []
    has_labels = names and all(table.metrics.get("label_names") == names for table in tables)
    return [
        by_position(int(tables[0].spec["context_tokens"])),
        by_label(names) if has_labels else by_frequency(count_tokens(storage, snapshot)),
    ]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    figures = {name: evaluation[name] for name in ("n_rows", "split", "fvu", "fvu_interval", "l0", "n_dead")}
    figures |= {f"fvu_{name}": value for name, value in evaluation["controls"]["fvu"].items()}
    if evaluation["ce"]:
        names = ("clean", "sae", "increase", "recovered_zero", "kl")
        figures |= {f"ce_{name}" if name != "kl" else name: evaluation["ce"][name] for name in names}
    if evaluation["interpretability"]:
        scores = evaluation["interpretability"]
        figures |= {f"interpretable_{name}": scores[name]["top_tenth"] for name in ("latents", "neurons")}
    return figures


def _finite(value: Any) -> Any:
    """JSON has no NaN: figures that are undefined become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
