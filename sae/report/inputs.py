"""What a report is made from: one SAE's artefacts, read from the store and checked."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae.errors import StoreError
from sae.report.config import ReportedSAE, ReportSpec
from sae.report.model_labels import with_model_labels
from sae.report.rules import DEFINITIONS
from sae.store.artefacts import records
from sae.store.storage.filesystem import Storage

_RULE_FIELDS = {"kind": pa.string(), "name": pa.string(), "share": pa.float64(), "passes": pa.bool_()}
_COUNTED = ("counts", "precision", "recall", "lift")
LATENT_COLUMNS = (
    *("duplicate_of", "tokens", "token_bytes", "previous_tokens", "previous_bytes", "syntax", "positions"),
    *(f"{what}_{figure}" for what in ("token", "previous", "syntax") for figure in _COUNTED),
    *("rule_kind", "rule_name", "rule_bytes", "rule_precision", "rule_recall", "rule_lift"),
    *("coactive", "coactive_lift", "coactive_share", "coactive_count", "neurons", "neuron_weights"),
)
"""What the page shows of a latent beside its firings."""


@dataclass(frozen=True)
class SAEInputs:
    """One SAE and everything known about it."""

    key: str
    """Its name in addresses and file names: [a-z0-9-], unique in the report."""
    entry: ReportedSAE
    cfg: dict[str, Any]
    metrics: pa.Table | None
    """Training curves, one row per logged step."""
    evaluation: dict[str, Any]
    untrained: dict[str, Any] | None
    control_units: dict[str, Path]
    """Tables of the controls' units with their number of firings: "untrained subject", "raw neurons"."""
    concepts: dict[str, Any] | None
    statistics: dict[str, Any]
    latents: pa.Table
    """latents.parquet, sorted by id, with the columns of interpretability.parquet (null where a unit has no score) and
    a model's labels (null where none was asked)."""
    examples: Path
    rows: Path | None
    """rows.parquet: a sample of rows with the latents that fire on each; the same rows for every SAE of a run."""
    passages: Path | None
    """passages.parquet: held-out contexts with the strongest latents of every token; None without text."""
    sae_folder: Path
    snapshot: str | None
    """What the SAE was trained on."""
    spec: dict[str, Any]
    """Of the SAE: its whole recipe."""


@contextlib.contextmanager
def open_inputs(storage: Storage, spec: ReportSpec) -> Iterator[list[SAEInputs]]:
    """Read the artefacts of every SAE of the report; example files stay on disk and are valid inside the block.

    Raises: StoreError when an artefact is not finished or a file is not what the report needs.
    """
    keys = unique_keys([entry.name for entry in spec.saes])
    with contextlib.ExitStack() as stack:

        def open_artefact(ref: str) -> tuple[records.Record, Path]:
            record = records.require_record(storage, ref)
            return record, stack.enter_context(records.local_files(storage, record))

        yield [_read(key, entry, open_artefact) for key, entry in zip(keys, spec.saes, strict=True)]


def unique_keys(names: list[str]) -> list[str]:
    """Names -> short keys for addresses and files, unique and in order."""
    keys: list[str] = []
    for name in names:
        base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "sae"
        key, n = base, 2
        while key in keys:
            key, n = f"{base}-{n}", n + 1
        keys.append(key)
    return keys


def _read(key: str, entry: ReportedSAE, open_artefact: Callable[[str], tuple[records.Record, Path]]) -> SAEInputs:
    record, sae = open_artefact(entry.sae)
    evaluation, statistics = open_artefact(entry.evaluation)[1], open_artefact(entry.statistics)[1]
    untrained = open_artefact(entry.untrained_evaluation)[1] if entry.untrained_evaluation else None
    labels = open_artefact(entry.labels)[1] / "labels.parquet" if entry.labels else None
    latents = pq.read_table(statistics / "latents.parquet").sort_by("latent")
    if missing := [name for name in LATENT_COLUMNS if name not in latents.column_names]:
        raise StoreError(f"{entry.statistics}: latents.parquet has no {', '.join(missing)}; run that stage again")
    if latents["latent"].to_pylist() != list(range(latents.num_rows)):
        raise StoreError(f"{entry.statistics}: latents.parquet does not hold every latent exactly once")
    rules = evaluation / "interpretability.parquet"
    metrics = sae / "metrics.parquet"
    return SAEInputs(
        key=key,
        entry=entry,
        cfg=_json(sae / "cfg.json"),
        metrics=pq.read_table(metrics) if metrics.exists() else None,
        evaluation=_json(evaluation / "evaluation.json"),
        untrained=_json(untrained / "evaluation.json") if untrained else None,
        control_units={
            name: path
            for name, path in (
                ("untrained subject", untrained and untrained / "interpretability.parquet"),
                ("raw neurons", evaluation / "neurons.parquet"),
            )
            if path and path.exists()
        },
        concepts=_json(evaluation / "concepts.json") if (evaluation / "concepts.json").exists() else None,
        statistics=_json(statistics / "statistics.json"),
        latents=with_model_labels(_with_rules(latents, pq.read_table(rules) if rules.exists() else None), labels),
        examples=statistics / "examples.parquet",
        rows=_existing(statistics / "rows.parquet"),
        passages=_existing(statistics / "passages.parquet"),
        sae_folder=sae,
        snapshot=record.spec.get("snapshot"),
        spec=record.spec,
    )


def _with_rules(latents: pa.Table, rules: pa.Table | None) -> pa.Table:
    """Join the rules onto the latents; the columns are there even when nothing was scored."""
    columns = [f"{definition}_{field}" for definition in DEFINITIONS for field in _RULE_FIELDS]
    by_unit: dict[int, dict[str, Any]] = {}
    if rules is not None:
        by_unit = {row["unit"]: row for row in rules.to_pylist()}
    for column in columns:
        values = [by_unit.get(unit, {}).get(column) for unit in range(latents.num_rows)]
        field_type = _RULE_FIELDS[column.rsplit("_", 1)[1]]
        latents = latents.append_column(column, pa.array(values, type=field_type))
    return latents


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise StoreError(f"{path}: the report needs this file and its artefact has none; run that stage again")
    return dict(json.loads(path.read_text()))
