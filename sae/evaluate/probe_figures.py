"""Sparse probes of one SAE and its controls, from the rows of the store to figures and a table."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sae.evaluate import probing
from sae.evaluate.config import EvaluationSpec
from sae.evaluate.controls import Control, ControlFindings, Coordinates
from sae.evaluate.probing import DenseColumns, SparseColumns, Task
from sae.evaluate.reconstruction import Reconstruction
from sae.evaluate.rows import RowTexts
from sae.progress import Progress
from sae.store.artefacts import records
from sae.store.reading.blocks import iter_rows
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.subject.load import Subject
from sae.subject.text import token_bytes

PROBING_FILE = "probing.parquet"
MAX_ELEMENTS = 1 << 27
"""Activations in memory (512 MiB of float32): wide hook points are probed on fewer rows."""


def write_probes(
    storage: Storage,
    spec: EvaluationSpec,
    subject: Subject,
    snapshot: Snapshot,
    found: Reconstruction,
    controls: dict[str, Control],
    control_found: ControlFindings,
    folder: Path,
    progress: Progress,
) -> dict[str, Any] | None:
    """Write probing.parquet into `folder`; returns the part of evaluation.json that sums it up, None when there are
    too few rows of any class."""
    texts = found.texts
    assert texts is not None, "probes are of rows with text"
    n_rows = min(spec.config.n_probe_rows, len(texts), max(1, MAX_ELEMENTS // snapshot.d_in))
    x = _first_rows(storage, snapshot, n_rows)
    columns: dict[str, probing.Columns] = {
        "latents": SparseColumns(found.firings, n_rows, found.counts.d_sae),
        "neurons": DenseColumns(x),
    }
    pca = controls.get("pca")
    if isinstance(pca, Coordinates):
        columns["pca"] = DenseColumns(pca.all(torch.from_numpy(x).to(pca.mean.device)).cpu().numpy())
    columns["random"] = SparseColumns(control_found.firings["random"], n_rows, controls["random"].n_units)
    fitted = probing.split_contexts(texts.context[:n_rows], spec.seed)
    scores = []
    for task in _tasks(storage, spec, subject, texts, n_rows):
        scores += probing.run_probes(task, columns, fitted, progress=progress)
    if not scores:
        return None
    pq.write_table(probing.scores_table(scores), folder / PROBING_FILE, compression="zstd")
    return {
        "n_rows": n_rows,
        "n_fitted": int(fitted.sum()),
        "rule": (
            f"one class against the rest, classes with at least {probing.MIN_ROWS} rows in each half of the contexts; "
            f"the k units whose class means differ most on one half, logistic regression on them, measured on the "
            f"other half; {probing.DENSE}: least squares on every dimension of the hook point, the ceiling"
        ),
        "scores": probing.summarize(scores),
    }


def _tasks(storage: Storage, spec: EvaluationSpec, subject: Subject, texts: RowTexts, n_rows: int) -> list[Task]:
    token = texts.token[:n_rows]
    ids = np.unique(token).tolist()
    letters = probing.letter_task(token, dict(zip(ids, token_bytes(subject.tokenizer, ids), strict=True)))
    names = records.require_record(storage, spec.tokens[0]).metrics.get("label_names")
    if texts.label is None or not names:
        return [letters]
    return [Task("syntax", tuple(names), texts.label[:n_rows].astype(np.int64)), letters]


def _first_rows(storage: Storage, snapshot: Snapshot, n_rows: int) -> np.ndarray:
    """[n_rows, d_in] float32"""
    x = np.empty((n_rows, snapshot.d_in), np.float32)
    done = 0
    for block in iter_rows(storage, snapshot):
        act = block.act[: n_rows - done]
        x[done : done + len(act)] = act
        done += len(act)
        if done >= n_rows:
            break
    return x
