"""The overview: headline numbers, each beside its controls, and what a reader must be warned of."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sae.report import charts
from sae.report.control_tables import Figures, ScoreTable, figures, label_table, probe_table, rule_table
from sae.report.display import Segment, plain
from sae.report.error_charts import error_charts
from sae.report.examples import Context
from sae.report.headlines import Headline, headlines
from sae.report.inputs import SAEInputs
from sae.report.numbers import NOT_AVAILABLE, compact, decimal, percent
from sae.report.pages import SAEPages
from sae.report.rules import Label, latent_label
from sae.report.sweep import SWEEP_MEASURES, sweep_chart, sweep_point

STEPS = 6
MIN_DRAWN = 30
"""Fewer live latents than this make no distribution worth a plot."""


@dataclass(frozen=True)
class Plot:
    """A chart and its rendering; `svg` is None where vl-convert is missing."""

    id: str
    """Unique in the page."""
    chart: charts.Chart
    svg: str | None


@dataclass(frozen=True)
class TokenSpan:
    """One token of a context on the overview: its segments and its colour step, 0 where the latent is silent."""

    segments: list[Segment]
    step: int
    peak: bool
    title: str


@dataclass(frozen=True)
class RandomLatent:
    """A latent of the random sample."""

    id: int
    label: Label | None
    frequency: str
    maximum: str
    value: str
    tokens: list[TokenSpan]


@dataclass(frozen=True)
class Overview:
    """What the template shows of one SAE."""

    key: str
    name: str
    headlines: list[Headline]
    tables: list[ScoreTable]
    """Rule scores and probes, beside those of other units; what a model's words are worth."""
    figures: list[Figures]
    errors: list[Plot]
    plots: list[Plot]
    random: list[RandomLatent]
    has_labels: bool
    warnings: list[str]


def overview(inputs: SAEInputs, pages: SAEPages) -> Overview:
    """Collect what the overview shows of one SAE; draws its plots."""
    return Overview(
        key=inputs.key,
        name=plain(inputs.entry.name, 80),
        headlines=headlines(inputs),
        tables=[table for table in (rule_table(inputs), label_table(inputs), probe_table(inputs)) if table is not None],
        figures=figures(inputs),
        errors=_draw(f"{inputs.key}-error", error_charts(inputs.evaluation)),
        plots=_draw(f"{inputs.key}-plot", _charts(inputs)),
        random=[_random(inputs, latent, context) for latent, context in pages.random_latents],
        has_labels=inputs.latents["rule_kind"].null_count < inputs.latents.num_rows,
        warnings=_warnings(inputs),
    )


def sweep_plots(saes: list[SAEInputs]) -> list[Plot]:
    """FVU and CE increase against L0 over the SAEs of the report, where at least two have them."""
    drawn = []
    for measure in SWEEP_MEASURES:
        points = [point for inputs in saes if (point := _sweep_point(inputs, measure)) is not None]
        if len(points) > 1:
            drawn.append(sweep_chart(points, measure))
    return _draw("sweep", drawn)


def _sweep_point(inputs: SAEInputs, measure: str) -> dict[str, Any] | None:
    figures_of = inputs.evaluation if measure == "fvu" else inputs.evaluation.get("ce") or {}
    value, l0 = figures_of.get(measure), inputs.evaluation.get("l0")
    if value is None or not l0:
        return None
    name, family, sparsity = (
        plain(text, 200) for text in (inputs.entry.name, inputs.entry.family, inputs.entry.sparsity)
    )
    return sweep_point(name, family, sparsity, l0, measure, value, figures_of.get(f"{measure}_interval"))


def all_charts(overviews: list[Overview], sweeps: list[Plot]) -> dict[str, charts.Chart]:
    """Every chart of the page by its id."""
    plots = [plot for shown in overviews for plot in (*shown.errors, *shown.plots)]
    return {plot.id: plot.chart for plot in (*sweeps, *plots)}


def _draw(prefix: str, found: list[charts.Chart]) -> list[Plot]:
    return [Plot(f"{prefix}-{i}", chart, charts.render_svg(chart)) for i, chart in enumerate(found)]


def step_of(value: float, maximum: float) -> int:
    """The colour step of an activation: 0 for silence, else 1 to STEPS, linear in value / maximum."""
    if not value > 0 or not maximum > 0:
        return 0
    return min(STEPS, max(1, math.ceil(STEPS * value / maximum)))


def _charts(inputs: SAEInputs) -> list[charts.Chart]:
    frequency = inputs.latents["frequency"].to_numpy().astype(np.float64)
    mean_act = inputs.latents["mean_act"].to_numpy().astype(np.float64)
    drawn = []
    if (frequency > 0).sum() >= MIN_DRAWN:
        drawn.append(charts.density_chart(frequency, int(inputs.statistics["n_rows"]), _control_frequencies(inputs)))
        drawn.append(charts.activation_chart(frequency, mean_act))
    if inputs.metrics is not None:
        drawn += charts.training_charts(inputs.metrics)
    return drawn


def _control_frequencies(inputs: SAEInputs) -> dict[str, np.ndarray]:
    """How often each unit of every control fires on the scored rows."""
    found = {}
    for name, path in inputs.control_units.items():
        evaluation = inputs.untrained if name == "untrained subject" else inputs.evaluation
        scored = (evaluation or {}).get("interpretability")
        if scored:
            found[name] = pq.read_table(path, columns=["n_fires"])["n_fires"].to_numpy() / scored["n_rows"]
    return found


def _random(inputs: SAEInputs, latent: int, context: Context | None) -> RandomLatent:
    row = {name: inputs.latents[name][latent].as_py() for name in inputs.latents.column_names}
    maximum = float(row["max_act"])
    tokens = []
    if context:
        values = dict(context.firing)
        tokens = [
            TokenSpan(
                context.segments(index),
                step_of(values.get(index, 0.0), maximum),
                index == context.peak,
                f"{decimal(values[index])}" if index in values else "",
            )
            for index in range(len(context.tokens))
        ]
    return RandomLatent(
        id=latent,
        label=latent_label(row),
        frequency=percent(row["frequency"]),
        maximum=decimal(maximum),
        value=decimal(context.value) if context else NOT_AVAILABLE,
        tokens=tokens,
    )


def _warnings(inputs: SAEInputs) -> list[str]:
    evaluation, statistics = inputs.evaluation, inputs.statistics
    found = []
    if evaluation.get("split") != "heldout":
        found.append("Measured on the training rows: this run keeps no held-out rows.")
    if not statistics.get("has_text", True):
        found.append("Activations were given without text: rows are shown by label or number.")
    if not evaluation.get("interpretability") and statistics.get("has_text", True):
        found.append("No rule was scored, so latents carry no labels.")
    ce = evaluation.get("ce") or {}
    if ce.get("zero") and ce.get("unigram") and ce["zero"] > ce["unigram"]:
        found.append(
            f"Zero ablation ({decimal(ce['zero'])} nats) is worse than the unigram loss ({decimal(ce['unigram'])}), "
            f"so the recovered share flatters; read the CE increase."
        )
    if (gamma := (evaluation.get("shrinkage") or {}).get("gamma_centred")) and abs(gamma - 1) > 0.05:
        found.append(
            f"Reconstructions are too {'small' if gamma < 1 else 'large'}: γ about the mean is {decimal(gamma)}."
        )
    found += _worse_than_neurons(evaluation)
    if (evaluation.get("dead_fraction") or 0) > 0.1:
        found.append(f"{percent(evaluation['dead_fraction'])} of the latents are dead.")
    n_dense = int(np.sum(inputs.latents["dense"].to_numpy()))
    if n_dense and statistics.get("has_text", True):
        found.append(f"{n_dense:,} latents are dense; they fire on so many tokens that top contexts mislead.")
    if statistics["n_rows"] != evaluation["n_rows"]:
        found.append(
            f"Statistics are over {compact(statistics['n_rows'])} rows, training and held-out together; "
            f"the headline numbers above are over {compact(evaluation['n_rows'])}."
        )
    return found


def _worse_than_neurons(evaluation: dict[str, Any]) -> list[str]:
    """Where a probe on raw neurons beats one on as many latents."""
    scores = (evaluation.get("probing") or {}).get("scores") or []
    accuracy = {(row["task"], row["k"], row["units_of"]): row["balanced_accuracy"] for row in scores}
    found = []
    for task, k, kind in accuracy:
        latents, neurons = accuracy[task, k, kind], accuracy.get((task, k, "neurons"))
        if kind == "latents" and neurons is not None and neurons > latents:
            label = "syntax class" if task == "syntax" else "first letter"
            ours, theirs = ("latents", "neurons tell") if k > 1 else ("latent", "neuron tells")
            found.append(
                f"{k} raw {theirs} the {label} better than {k} {ours}: balanced accuracy {percent(neurons)} against "
                f"{percent(latents)}."
            )
    return found
