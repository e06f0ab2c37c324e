"""A model's words about latents, beside the rules and never in their place. The words are foreign text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae.report.display import Segment, plain, show_text
from sae.report.numbers import short

_SCORES = {"detection": "detection_balanced_accuracy", "fuzzing": "fuzzing_balanced_accuracy"}
_COLUMNS = {
    "model_name": ("model", pa.string()),
    "model_explanation": ("explanation", pa.string()),
    "model_error": ("error", pa.string()),
    **{
        f"model_{test}{end}": (f"{column}{end}", pa.float64())
        for test, column in _SCORES.items()
        for end in ("", "_low", "_high")
    },
    **{f"model_{test}_n": (f"{test}_n", pa.int32()) for test in _SCORES},
}
"""Column of the report's latents.parquet -> column of labels.parquet and its type."""


def with_model_labels(latents: pa.Table, path: Path | None) -> pa.Table:
    """Join labels.parquet onto the latents; the columns are there, null, where no model was asked.

    Args:
        latents: sorted by id, every id once.
    """
    by_latent = {row["latent"]: row for row in pq.read_table(path).to_pylist()} if path is not None else {}
    for name, (column, kind) in _COLUMNS.items():
        values = [by_latent.get(latent, {}).get(column) for latent in range(latents.num_rows)]
        latents = latents.append_column(name, pa.array(values, kind))
    return latents


def model_label(row: Mapping[str, Any]) -> list[Any] | None:
    """For the page: [model, segments of its explanation or None, why there is none or "", detection, fuzzing].

    A score is [balanced accuracy, low, high, answers], or None where there is none. None when no model was asked.
    """
    if row.get("model_name") is None:
        return None
    explanation = row["model_explanation"]
    return [
        plain(row["model_name"], 80),
        None if explanation is None else show_text(explanation),
        plain(row["model_error"] or ""),
        *(_score(row, test) for test in _SCORES),
    ]


def model_words(row: Mapping[str, Any]) -> list[list[Segment]]:
    """The explanation for the list and its search: one entry, or none."""
    explanation = row.get("model_explanation")
    return [] if explanation is None else [show_text(explanation)]


def _score(row: Mapping[str, Any], test: str) -> list[float | int] | None:
    if row[f"model_{test}"] is None:
        return None
    return [*(short(row[f"model_{test}{end}"]) for end in ("", "_low", "_high")), row[f"model_{test}_n"]]
