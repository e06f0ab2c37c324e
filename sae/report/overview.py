"""The overview: headline numbers, each beside its controls, and what a reader must be warned of."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.report import charts
from sae.report.display import Segment, plain
from sae.report.examples import Context
from sae.report.inputs import SAEInputs
from sae.report.numbers import NOT_AVAILABLE, compact, decimal, interval, percent
from sae.report.pages import SAEPages
from sae.report.rules import TITLES, Rule, label_of, rules_of

STEPS = 6
MIN_DRAWN = 30
"""Fewer live latents than this make no distribution worth a plot."""


@dataclass(frozen=True)
class Headline:
    """One number, how sure it is, and what to compare it with."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""
    controls: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """A chart and its rendering; `svg` is None where vl-convert is missing."""

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
    rule: Rule | None
    frequency: str
    maximum: str
    value: str
    tokens: list[TokenSpan]


@dataclass(frozen=True)
class Overview:
    """What the template shows of one SAE."""

    key: str
    name: str
    architecture: str
    headlines: list[Headline]
    scores: list[tuple[str, str, list[str]]]
    """(definition, its text, scores of latents, raw neurons and the untrained subject's SAE)."""
    score_units: list[str]
    other_definitions: list[tuple[str, str]]
    plots: list[Plot]
    random: list[RandomLatent]
    warnings: list[str]


def overview(inputs: SAEInputs, pages: SAEPages) -> Overview:
    """Collect what the overview shows of one SAE; draws its plots."""
    evaluation = inputs.evaluation
    scores, units = _scores(inputs)
    legacy = evaluation.get("fvu_legacy") or {}
    return Overview(
        key=inputs.key,
        name=plain(inputs.entry.name, 80),
        architecture=_architecture(inputs.cfg),
        headlines=[_fvu(inputs), _l0(inputs), _cross_entropy(evaluation.get("ce")), _dead(inputs)],
        scores=scores,
        score_units=units,
        other_definitions=[(f"FVU, {name.replace('_', ' ')}", decimal(value)) for name, value in legacy.items()],
        plots=[Plot(chart, charts.render_svg(chart)) for chart in _charts(inputs)],
        random=[_random(inputs, latent, context) for latent, context in pages.random_latents],
        warnings=_warnings(inputs),
    )


def sweep_plot(saes: list[SAEInputs]) -> Plot | None:
    """FVU against L0 over the SAEs of the report; None when there is only one."""
    points = []
    for inputs in saes:
        fvu, l0 = inputs.evaluation.get("fvu"), inputs.evaluation.get("l0")
        if fvu is not None and l0:
            low, high = inputs.evaluation.get("fvu_interval") or (fvu, fvu)
            name = plain(inputs.entry.name, 40)
            points.append({"name": name, "l0": l0, "fvu": fvu, "low": low, "high": high})
    if len(points) < 2:
        return None
    chart = charts.sweep_chart(points)
    return Plot(chart, charts.render_svg(chart))


def step_of(value: float, maximum: float) -> int:
    """The colour step of an activation: 0 for silence, else 1 to STEPS, linear in value / maximum."""
    if not value > 0 or not maximum > 0:
        return 0
    return min(STEPS, max(1, math.ceil(STEPS * value / maximum)))


def _architecture(cfg: dict[str, Any]) -> str:
    name = cfg.get("architecture") or cfg.get("sae", {}).get("architecture") or "SAE"
    return plain(str(name), 40)


def _fvu(inputs: SAEInputs) -> Headline:
    evaluation, untrained = inputs.evaluation, inputs.untrained
    split = "held-out" if evaluation.get("split") == "heldout" else "training"
    controls = [("predicting the mean", "1")]
    if untrained:
        controls.append(("untrained subject", decimal(untrained.get("fvu"))))
    sure = interval(evaluation.get("fvu_interval"))
    rows = f"{evaluation['n_rows']:,} {split} rows"
    return Headline(
        "FVU",
        decimal(evaluation.get("fvu")),
        detail=f"95 % interval {sure}; {rows}" if sure else rows,
        controls=controls,
    )


def _l0(inputs: SAEInputs) -> Headline:
    rule = {"topk": "the k largest", "relu": "all positive"}.get(inputs.evaluation.get("l0_rule", ""), "")
    named = inputs.evaluation.get("l0_rule") or NOT_AVAILABLE
    controls = [("latents", f"{inputs.latents.num_rows:,}")]
    if inputs.untrained:
        controls.append(("untrained subject", decimal(inputs.untrained.get("l0"))))
    return Headline(
        "L0",
        decimal(inputs.evaluation.get("l0")),
        detail=f"latents per token, rule {plain(named)}" + (f": {rule}" if rule else ""),
        controls=controls,
    )


def _cross_entropy(ce: dict[str, Any] | None) -> Headline:
    if not ce:
        return Headline("CE increase", NOT_AVAILABLE, detail="not measured: no subject that predicts the next token")
    increase = ce.get("increase")
    sure = interval(ce.get("increase_interval"))
    recovered = [
        f"{percent(ce[name])} ({against} ablation)"
        for name, against in (("recovered_zero", "zero"), ("recovered_mean", "mean"))
        if ce.get(name) is not None
    ]
    named = [("clean", "clean"), ("sae", "with SAE"), ("mean", "mean"), ("zero", "zero")]
    named += [("bigram", "bigram"), ("unigram", "unigram")]
    details = ([f"95 % interval {sure}"] if sure else []) + ([f"recovered {', '.join(recovered)}"] if recovered else [])
    return Headline(
        "CE increase",
        ("+" if (increase or 0) > 0 else "") + decimal(increase),
        unit="nats",
        detail="; ".join(details),
        controls=[(label, decimal(ce[name])) for name, label in named if ce.get(name) is not None],
    )


def _dead(inputs: SAEInputs) -> Headline:
    n_latents = inputs.latents.num_rows
    n_dead = int(inputs.evaluation.get("n_dead") or 0)
    n_fired = inputs.latents["n_fired"].to_numpy()
    controls = [("dense", f"{int(np.sum(inputs.latents['dense'].to_numpy())):,}")]
    controls.append(("silent on all rows", f"{int(np.sum(n_fired == 0)):,}"))
    if inputs.untrained:
        controls.append(("untrained subject", percent(inputs.untrained.get("dead_fraction"))))
    rule = plain(str(inputs.evaluation.get("dead_rule") or ""))
    detail = f"{percent(n_dead / n_latents)} of {n_latents:,}" + (f"; {rule}" if rule else "")
    return Headline("Dead latents", f"{n_dead:,}", detail=detail, controls=controls)


def _scores(inputs: SAEInputs) -> tuple[list[tuple[str, str, list[str]]], list[str]]:
    """Rows of the interpretability table, and how many units each column is over."""
    scored = inputs.evaluation.get("interpretability")
    if not scored:
        return [], []
    untrained = (inputs.untrained or {}).get("interpretability") or {}
    columns = [scored.get("latents"), scored.get("neurons"), untrained.get("latents")]
    rows = [
        (
            TITLES.get(name, plain(name)),
            plain(str(text)),
            [percent(column.get(name)) if column else NOT_AVAILABLE for column in columns],
        )
        for name, text in (scored.get("definitions") or {}).items()
    ]
    units = [f"{column['n_units']:,}" if column and "n_units" in column else NOT_AVAILABLE for column in columns]
    return rows, units


def _charts(inputs: SAEInputs) -> list[charts.Chart]:
    frequency = inputs.latents["frequency"].to_numpy().astype(np.float64)
    mean_act = inputs.latents["mean_act"].to_numpy().astype(np.float64)
    drawn = []
    if (frequency > 0).sum() >= MIN_DRAWN:
        drawn.append(charts.density_chart(frequency, int(inputs.statistics["n_rows"])))
        drawn.append(charts.activation_chart(frequency, mean_act))
    if inputs.metrics is not None:
        drawn += charts.training_charts(inputs.metrics)
    return drawn


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
        rule=label_of(rules_of(row)),
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
