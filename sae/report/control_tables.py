"""Tables of the overview: scores of latents beside those of other units, and the figures behind the headlines."""

from dataclasses import dataclass
from typing import Any

from sae.intervals import mean_interval
from sae.report.display import plain
from sae.report.headlines import CONTROLS, signed
from sae.report.inputs import SAEInputs
from sae.report.numbers import NOT_AVAILABLE, decimal, interval, percent
from sae.report.rules import TITLES

UNITS = {"latents": "SAE latents", "neurons": "raw neurons", "pca": "PCA", "random": "random"}
"""Kinds of units of one evaluation -> their column."""
UNTRAINED = "SAE, untrained subject"
_TASKS = {"syntax": "syntax class", "first letter": "first letter of the token"}
_TESTS = {
    "detection": "told from the words, on contexts not shown before, whether the latent fires",
    "fuzzing": "told from the words whether the marked tokens are those on which it fires",
}
"""Tests of a model's words -> what is asked."""
_CEILING = "all neurons"
"""As sae.evaluate.probing calls the probe on every dimension."""


@dataclass(frozen=True)
class Cell:
    """A value of a table, and a second, smaller one."""

    text: str
    beside: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Rows of scores, one column per kind of units; the SAE's come first."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """(name, explanation, cells)."""
    footer: tuple[str, list[str]] | None
    notes: list[str]
    """How it is measured."""


@dataclass(frozen=True)
class Figures:
    """A few figures under their title."""

    title: str
    columns: list[str]
    """Of the values; empty where there is one."""
    rows: list[tuple[str, list[str]]]
    note: str


def rule_table(inputs: SAEInputs) -> ScoreTable | None:
    """Share of units that one rule explains; None when no rule was scored."""
    scored = inputs.evaluation.get("interpretability")
    if not scored:
        return None
    definitions = scored.get("definitions") or {}
    kinds = [kind for kind in UNITS if scored.get(kind)]
    columns = [(UNITS[kind], scored[kind]) for kind in kinds]
    untrained = ((inputs.untrained or {}).get("interpretability") or {}).get("latents")
    if untrained:
        columns.append((UNTRAINED, untrained))
    rows = [
        (TITLES.get(name, plain(name)), "", [Cell(percent(column.get(name))) for _, column in columns])
        for name in definitions
    ]
    return ScoreTable(
        "Share of units that one rule explains",
        [name for name, _ in columns],
        rows,
        ("units scored", [f"{column['n_units']:,}" for _, column in columns]),
        [
            "A rule is one token, one previous token or one syntax label. It is a lower bound on what a latent means, "
            "and no explanation.",
            *(f"{TITLES.get(name, plain(name))}: {plain(str(text))}." for name, text in definitions.items()),
            plain(str(scored.get("units") or ""), 600),
        ],
    )


def label_table(inputs: SAEInputs) -> ScoreTable | None:
    """What a model's words for latents are worth over all that it was asked about; None when none was asked."""
    latents = inputs.latents
    n_asked = latents.num_rows - latents["model_name"].null_count
    if not n_asked:
        return None
    n_explained = latents.num_rows - latents["model_explanation"].null_count
    models = sorted(latents["model_name"].drop_null().unique().to_pylist())
    rows = [("explained", f"of {n_asked:,} asked about", [Cell(f"{n_explained:,}"), Cell(""), Cell("")])]
    for test, what in _TESTS.items():
        values = latents[f"model_{test}"].drop_null().to_pylist()
        mean = sum(values) / len(values) if values else None
        bounds = mean_interval(values)
        sure = interval((max(0.0, bounds[0]), min(1.0, bounds[1]))) if bounds else NOT_AVAILABLE
        rows.append((test, what, [Cell(f"{len(values):,}"), Cell(decimal(mean)), Cell(sure)]))
    return ScoreTable(
        "Labels by a model",
        ["latents", "mean balanced accuracy", "95 % interval"],
        rows,
        ("latents of the SAE", [f"{latents.num_rows:,}", "", ""]),
        [
            f"The words are those of {plain(', '.join(models))}, which also answered. Chance is .5.",
            "Every latent counts the same in the mean. The interval, by Student's t, is that of the latents from which "
            "those asked about were drawn at random; it says nothing where they were chosen.",
        ],
    )


def probe_table(inputs: SAEInputs) -> ScoreTable | None:
    """How well a few units tell labels that are known; None without probes."""
    probing = inputs.evaluation.get("probing")
    if not probing:
        return None
    own = {(row["task"], row["units_of"], row["k"]): row for row in probing["scores"]}
    other = {
        (row["task"], row["units_of"], row["k"]): row
        for row in ((inputs.untrained or {}).get("probing") or {}).get("scores", [])
    }
    kinds = [kind for kind in UNITS if any(units == kind for _, units, _ in own)]
    has_untrained = any(units == "latents" for _, units, _ in other)
    rows = []
    for task, k in dict.fromkeys((row["task"], row["k"]) for row in probing["scores"] if row["k"] is not None):
        cells = [_probe_cell(own.get((task, kind, k))) for kind in kinds]
        if has_untrained:
            cells.append(_probe_cell(other.get((task, "latents", k))))
        cells.append(_probe_cell(own.get((task, _CEILING, None))))
        n_classes = next(row["n_classes"] for row in probing["scores"] if (row["task"], row["k"]) == (task, k))
        name = f"{_TASKS.get(task, plain(task, 40))}, {k} unit{'s' if k > 1 else ''}"
        rows.append((name, f"mean over {n_classes} classes", cells))
    return ScoreTable(
        "Sparse probing",
        [*(UNITS[kind] for kind in kinds), *([UNTRAINED] if has_untrained else []), "all neurons at once"],
        rows,
        None,
        [
            f"Balanced accuracy (chance 50 %) and F1 on {probing['n_rows'] - probing['n_fitted']:,} rows that chose "
            f"nothing: {plain(str(probing['rule']), 600)}."
        ],
    )


def _probe_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(NOT_AVAILABLE)
    return Cell(percent(row["balanced_accuracy"]), f"F1 {decimal(row['f1'])}")


def figures(inputs: SAEInputs) -> list[Figures]:
    """What stands behind the headlines, and the same under other definitions."""
    evaluation = inputs.evaluation
    found = [
        _prediction(evaluation.get("ce")),
        _shrinkage(evaluation.get("shrinkage")),
        _geometry(evaluation.get("geometry")),
        _legacy(evaluation.get("fvu_legacy")),
    ]
    return [one for one in found if one is not None]


def _prediction(ce: dict[str, Any] | None) -> Figures | None:
    if not ce:
        return None
    controls = ce.get("controls") or {}
    rows: list[tuple[str, float | None, float | None]] = [("SAE", ce.get("sae"), ce.get("kl"))]
    for name, label in CONTROLS.items():
        if name in controls:
            rows.append((label, ce["clean"] + controls[name]["increase"], controls[name]["kl"]))
    rows += [
        ("mean ablation", ce.get("mean"), ce.get("kl_mean")),
        ("zero ablation", ce.get("zero"), ce.get("kl_zero")),
        ("bigram model", ce.get("bigram"), None),
        ("unigram model", ce.get("unigram"), None),
    ]
    shown = [("untouched", [decimal(ce["clean"]), "0", "0"])]
    for name, loss, kl in rows:
        if loss is not None:
            shown.append((name, [decimal(loss), signed(loss - ce["clean"]), decimal(kl) if kl is not None else ""]))
    return Figures(
        "Next-token prediction",
        ["CE", "increase", "KL"],
        shown,
        f"Nats per token over {ce.get('n_targets', 0):,} predictions. KL is from the untouched model's distribution to "
        f"the one with the replacement.",
    )


def _shrinkage(shrinkage: dict[str, Any] | None) -> Figures | None:
    if not shrinkage:
        return None
    names = {
        "gamma": "relative reconstruction bias γ",
        "gamma_centred": "γ about the mean",
        "norm_ratio": "mean norm of x̂ / of x",
        "mean_cosine": "mean cosine of x̂ and x",
    }
    return Figures(
        "Shrinkage",
        [],
        [(label, [decimal(shrinkage.get(name))]) for name, label in names.items()],
        "γ = E‖x̂‖² / E[x·x̂], the g that minimises E‖x̂ / g − x‖² (Rajamanoharan et al. 2024); 1 is unbiased. About the "
        "mean: of x − mean and x̂ − mean.",
    )


def _geometry(geometry: dict[str, Any] | None) -> Figures | None:
    if not geometry:
        return None
    columns = [geometry["decoder"], geometry["random"]]
    above = decimal(geometry["duplicate_above"], 1)
    rows = [
        ("cosine to the nearest other", [decimal(column.get("mean_max_cosine")) for column in columns]),
        (f"share nearer than {above}", [percent(column.get("duplicate_share")) for column in columns]),
        (
            f"dimensions filled, of {geometry['d_in']:,}",
            [decimal(column.get("participation_ratio")) for column in columns],
        ),
        ("cosine of encoder and decoder", [decimal(geometry.get("encoder_decoder_cosine")), ""]),
        ("norms", [f"{decimal(geometry.get('norm_min'))} to {decimal(geometry.get('norm_max'))}", ""]),
    ]
    return Figures(
        "Decoder geometry",
        ["decoder", "random"],
        rows,
        f"Of decoder rows and of as many random directions; nearest others of {geometry['n_compared']:,} rows. "
        f"Dimensions filled: participation ratio of the directions' second moments.",
    )


def _legacy(legacy: dict[str, Any] | None) -> Figures | None:
    if not legacy:
        return None
    return Figures(
        "FVU under other definitions",
        [],
        [(plain(name.replace("_", " "), 60), [decimal(value)]) for name, value in legacy.items()],
        "Named variants found in other code; not comparable with FVU above.",
    )
