"""The numbers a reader sees first, each beside the controls that say what it is worth."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sae.report.display import plain
from sae.report.inputs import SAEInputs
from sae.report.numbers import NOT_AVAILABLE, decimal, interval, percent

CONTROLS = {"neurons": "neurons", "pca": "PCA", "random": "random"}
"""Controls of the evaluation -> what they are called, in the order in which they are shown."""
_RULES = {"topk": "the k largest", "relu": "all positive", "threshold": "above one threshold"}


@dataclass(frozen=True)
class Headline:
    """One number, how sure it is, and what to compare it with."""

    label: str
    value: str
    unit: str = ""
    detail: str = ""
    controls: list[tuple[str, str]] = field(default_factory=list)
    controls_title: str = ""


def headlines(inputs: SAEInputs) -> list[Headline]:
    """FVU, L0, CE increase and dead latents."""
    return [_fvu(inputs), _l0(inputs), _cross_entropy(inputs), _dead(inputs)]


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return ("+" if (value or 0) > 0 else "") + decimal(value)


def _fvu(inputs: SAEInputs) -> Headline:
    evaluation = inputs.evaluation
    found = evaluation.get("controls") or {}
    split = "held-out" if evaluation.get("split") == "heldout" else "training"
    controls = []
    if inputs.untrained:
        controls.append(("untrained subject", decimal(inputs.untrained.get("fvu"))))
    controls += [
        (label, decimal(found["fvu"][name]))
        for name, label in CONTROLS.items()
        if (found.get("fvu") or {}).get(name) is not None
    ]
    controls.append(("the mean alone", "1"))
    sure = interval(evaluation.get("fvu_interval"))
    rows = f"{evaluation['n_rows']:,} {split} rows"
    return Headline(
        "FVU",
        decimal(evaluation.get("fvu")),
        detail=f"95 % interval {sure}; {rows}" if sure else rows,
        controls=controls,
        controls_title=f"controls, {found['k']:,} numbers a row" if "k" in found else "controls",
    )


def _l0(inputs: SAEInputs) -> Headline:
    named = inputs.evaluation.get("l0_rule") or NOT_AVAILABLE
    controls = [("latents", f"{inputs.latents.num_rows:,}")]
    if inputs.untrained:
        controls.append(("untrained subject", decimal(inputs.untrained.get("l0"))))
    return Headline(
        "L0",
        decimal(inputs.evaluation.get("l0")),
        detail=f"latents per token, rule {plain(named)}" + (f": {_RULES[named]}" if named in _RULES else ""),
        controls=controls,
    )


def _cross_entropy(inputs: SAEInputs) -> Headline:
    ce = inputs.evaluation.get("ce")
    if not ce:
        return Headline("CE increase", NOT_AVAILABLE, detail="not measured: no subject that predicts the next token")
    sure, kl_sure = interval(ce.get("increase_interval")), interval(ce.get("kl_interval"))
    details = [f"95 % interval {sure}"] if sure else []
    if ce.get("kl") is not None:
        details.append(f"KL {decimal(ce['kl'])}" + (f" ({kl_sure})" if kl_sure else ""))
    recovered = [
        f"{percent(ce[name])} of {against}"
        for name, against in (("recovered_zero", "zero"), ("recovered_mean", "mean"))
        if ce.get(name) is not None
    ]
    if recovered:
        details.append(f"recovers {', '.join(recovered)} ablation")
    untrained = (inputs.untrained or {}).get("ce") or {}
    controls = [("untrained subject", signed(untrained["increase"]))] if "increase" in untrained else []
    controls += [
        (label, signed(ce["controls"][name]["increase"]))
        for name, label in CONTROLS.items()
        if name in (ce.get("controls") or {})
    ]
    controls.append(("the mean alone", signed(_difference(ce, "mean"))))
    return Headline(
        "CE increase",
        signed(ce.get("increase")),
        unit="nats",
        detail="; ".join(details),
        controls=controls,
        controls_title="controls",
    )


def _difference(ce: dict[str, Any], variant: str) -> float | None:
    """Loss of a variant over the clean loss."""
    clean, other = ce.get("clean"), ce.get(variant)
    return None if clean is None or other is None else other - clean


def _dead(inputs: SAEInputs) -> Headline:
    n_latents = inputs.latents.num_rows
    n_dead = int(inputs.evaluation.get("n_dead") or 0)
    n_fired = inputs.latents["n_fired"].to_numpy()
    controls = []
    if inputs.untrained:
        controls.append(("untrained subject", percent(inputs.untrained.get("dead_fraction"))))
    controls.append(("silent on all rows", f"{int(np.sum(n_fired == 0)):,}"))
    controls.append(("dense", f"{int(np.sum(inputs.latents['dense'].to_numpy())):,}"))
    duplicates = (inputs.evaluation.get("geometry") or {}).get("decoder") or {}
    if duplicates.get("duplicate_share") is not None:
        controls.append(("duplicates", percent(duplicates["duplicate_share"])))
    rule = plain(str(inputs.evaluation.get("dead_rule") or ""))
    detail = f"{percent(n_dead / n_latents)} of {n_latents:,}" + (f"; {rule}" if rule else "")
    return Headline("Dead latents", f"{n_dead:,}", detail=detail, controls=controls)
