"""The numbers a run is judged by, one row per SAE."""

import json
from typing import Any

from sae.plan import Plan
from sae.store.artefacts.records import local_files, read_record
from sae.store.storage.filesystem import Storage

MAX_COLUMNS = 8
"""SAEs beside each other in a table of Markdown."""
MAX_LINES = 2
"""SAEs of which a terminal shows every figure."""
TERMINAL_KEYS = ("sae", "fvu", "l0", "dead", "ce_increase", "kl", "interpretable", "fvu_neurons")
"""Figures of a sweep in a terminal: what fits 100 characters. The report and `--json` have all."""


def read_evaluation(storage: Storage, ref: str) -> dict[str, Any] | None:
    """The evaluation at an address, or None when there is none."""
    record = read_record(storage, ref)
    if record is None:
        return None
    with local_files(storage, record) as folder:
        return dict(json.loads((folder / "evaluation.json").read_text()))


def headlines(storage: Storage, plan: Plan) -> list[dict[str, Any]]:
    """One row per evaluated SAE; the untrained control last."""
    rows = []
    names = [entry.name for entry in plan.report.saes] if plan.report else []
    for name, spec in zip(names, plan.evaluations, strict=True):
        if (evaluation := read_evaluation(storage, spec.ref)) is not None:
            rows.append({"sae": name} | _row(evaluation))
    if plan.control and (evaluation := read_evaluation(storage, plan.control.evaluations[0].ref)) is not None:
        rows.append({"sae": "control: untrained subject"} | _row(evaluation))
    return rows


def headline_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: one column per SAE of a few, for figures have more names than that; else one row each."""
    if not rows:
        return "No evaluation."
    keys = _keys(rows)
    table = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    if len(rows) <= MAX_COLUMNS:
        table = [list(column) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def headline_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for a terminal: of one SAE and its control all figures, a line each; of a sweep a table of the first."""
    if len(rows) <= MAX_LINES:
        return ["  ".join(f"{key} {_cell(value)}" for key, value in row.items()) for row in rows]
    keys = [key for key in TERMINAL_KEYS if key in _keys(rows)]
    table = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([cells[0].ljust(widths[0]), *(map(str.rjust, cells[1:], widths[1:]))]).rstrip() for cells in table
    ]


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _row(evaluation: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "split": evaluation["split"],
        "fvu": evaluation["fvu"],
        "l0": evaluation["l0"],
        "dead": evaluation["dead_fraction"],
    }
    row |= {f"fvu_{name}": value for name, value in evaluation["controls"]["fvu"].items()}
    if ce := evaluation.get("ce"):
        row |= {"ce_increase": ce["increase"], "ce_recovered_zero": ce["recovered_zero"], "kl": ce["kl"]}
    if scores := evaluation.get("interpretability"):
        row |= {
            "interpretable": scores["latents"]["top_tenth"],
            "neurons": scores["neurons"]["top_tenth"],
            "interpretable_mass": scores["latents"]["mass"],
            "neurons_mass": scores["neurons"]["mass"],
        }
    return row


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "n/a" if value is None else str(value)
