"""The plots of a sweep: a measure against L0, one line per family."""

import math
from typing import Any

from sae.report.charts import CATEGORIES, MUTED, TEXT, Chart, spec_of, x_axis, y_axis
from sae.report.numbers import decimal

SWEEP_MEASURES = {
    "fvu": ("FVU", "FVU"),
    "increase": ("CE increase", "CE increase, nats"),
}
"""Measure -> its name, and the title of its axis."""
WIDTH, HEIGHT = 330, 240
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross")
"""Of the families in turn, as the colours are: their numbers share no divisor, so 30 families look different."""
MAX_IN_LEGEND = len(SHAPES) * len(CATEGORIES)
LEGEND_CHARACTERS = 54
"""Of a line of the legend at the plot's width, symbols and gaps included."""
_SYMBOL = 7
"""Characters as wide as the symbol and the gap beside a name of the legend."""
CHOSEN = "chosen"
_SILENT = {"encoding": {"tooltip": {"value": None}}}
_TICKS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.2, 1.5, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
)
"""Leading figures of the ticks of L0, the fewest first."""


def sweep_point(
    name: str, family: str, sparsity: str, l0: float, measure: str, value: float, interval: tuple[float, float] | None
) -> dict[str, Any]:
    """One SAE of `sweep_chart`.

    Args:
        family, sparsity: as `ReportedSAE` has them; those of one family and sparsity differ in their seeds alone.
        measure: of SWEEP_MEASURES.
        interval: of the measure; None where there is none.
    """
    low, high = interval or (value, value)
    return {"name": name, "family": family, "sparsity": sparsity, "l0": l0, measure: value, "low": low, "high": high}


def sweep_chart(points: list[dict[str, Any]], measure: str = "fvu") -> Chart:
    """A measure against L0 of all SAEs of the report: a line per family, and the Pareto line.

    Args:
        points: of `sweep_point`. A family's line goes through the means over seeds.
        measure: of SWEEP_MEASURES.
    """
    name, title = SWEEP_MEASURES[measure]
    front, lines = pareto(points, measure), family_lines(points, measure)
    families = list(dict.fromkeys(point["family"] for point in points))
    spec = spec_of(points, {}, x=_l0_axis(points), y={**y_axis(measure, title), "scale": {"zero": False}})
    del spec["mark"]
    spec["usermeta"] = {"hint": "Click a family of the legend to see it alone."}
    spec |= {"width": WIDTH, "height": HEIGHT, "layer": [_pareto_line(front)]}
    spec["encoding"] |= {
        "color": _by_family(families, CATEGORIES),
        # Without a choice in the legend all are chosen.
        "opacity": {"condition": {"param": CHOSEN, "value": 1}, "value": 0.1},
    }
    if lines:  # a layer without data has no extent
        spec["layer"].append({"data": {"values": lines}, "mark": {"type": "line", "strokeWidth": 1.5}} | _SILENT)
    spec["layer"] += [_intervals(spec["encoding"]["y"]), _marks(families, measure, small=len(points) > MAX_IN_LEGEND)]
    seeds = len(points) > len({(point["family"], point["sparsity"]) for point in points})
    means = ", by means over seeds" if seeds else ""
    joined = f"; a solid line joins those of one family, more and less sparse{means}" if lines else ""
    return Chart(
        f"{name} against L0",
        "one point per SAE with its 95 % interval; lower left is better; the dashed line joins those that no other "
        f"beats in both{joined}",
        spec,
        ("SAE", "family", "L0", name, "on the dashed line"),
        [
            (str(p["name"]), str(p["family"]), decimal(p["l0"]), decimal(p[measure]), "yes" if p in front else "no")
            for p in points
        ],
    )


def family_lines(points: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """For every family with several sparsities the mean L0 and measure of each over its seeds, by L0."""
    lines = []
    for family, members in _by(points, "family").items():
        line = [
            {"family": family, **{key: sum(p[key] for p in same) / len(same) for key in ("l0", measure)}}
            for same in _by(members, "sparsity").values()
        ]
        if len(line) > 1:
            lines += sorted(line, key=lambda p: p["l0"])
    return lines


def pareto(points: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """The points that no other equals or beats in both L0 and the measure, by L0."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["l0"], p[measure])):
        if not front or point[measure] < front[-1][measure]:
            front.append(point)
    return front


def l0_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a log axis: three to eight, and fewer where `high` is not twice `low`."""
    found: list[float] = []
    for leading in _TICKS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [tick for decade in decades for first in leading if low <= (tick := first * 10.0**decade) <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 8)]


def _pareto_line(front: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": {"values": front},
        "mark": {"type": "line", "strokeWidth": 1, "strokeDash": [4, 3], "interpolate": "step-after"},
        "encoding": {"color": {"value": MUTED}, "opacity": {"value": 1}, **_SILENT["encoding"]},
    }


def _intervals(y: dict[str, Any]) -> dict[str, Any]:
    encoding = {"y": y | {"field": "low"}, "y2": {"field": "high"}, **_SILENT["encoding"]}
    return {"mark": {"type": "rule", "strokeWidth": 1}, "encoding": encoding}


def _marks(families: list[str], measure: str, *, small: bool) -> dict[str, Any]:
    """The SAEs themselves, which say who they are, and the legend, of which a family can be chosen."""
    words = {"name": "SAE", "family": "family", "sparsity": "made sparse by"}
    numbers = {"l0": "L0", measure: SWEEP_MEASURES[measure][0]}
    tooltip: list[dict[str, Any]] = [{"field": name, "type": "nominal", "title": words[name]} for name in words]
    tooltip += [{"field": name, "type": "quantitative", "title": numbers[name], "format": ".4~g"} for name in numbers]
    return {
        "params": [{"name": CHOSEN, "select": {"type": "point", "fields": ["family"]}, "bind": "legend"}],
        "mark": {"type": "point", "strokeWidth": 1.25 if small else 1.75, "size": 30 if small else 50},
        "encoding": {"shape": _by_family(families, SHAPES), "tooltip": tooltip},
    }


def _l0_axis(points: list[dict[str, Any]]) -> dict[str, Any]:
    low, high = min(p["l0"] for p in points) / 1.15, max(p["l0"] for p in points) * 1.15
    axis = x_axis("l0", "L0 (log)", l0_ticks(low, high))
    axis["axis"] |= {"format": "~g", "labelOverlap": False}
    return axis | {"scale": {"type": "log", "nice": False, "domain": [low, high]}}


def _by_family(families: list[str], looks: tuple[str, ...]) -> dict[str, Any]:
    """How families look, and the legend that says so, in as many columns as its longest name lets it have."""
    longest = max(map(len, families)) + _SYMBOL
    return {
        "field": "family",
        "type": "nominal",
        "scale": {"domain": families, "range": [looks[i % len(looks)] for i in range(len(families))]},
        "legend": {
            "title": None,
            "orient": "bottom",
            "columns": max(1, min(len(families), LEGEND_CHARACTERS // longest)),
            "columnPadding": 24,
            "offset": 10,
            "labelLimit": WIDTH,
            "labelColor": TEXT,
            "labelFontSize": 11,
            "symbolLimit": MAX_IN_LEGEND,
            "symbolOpacity": 1,
            "symbolSize": 50,
        },
    }


def _by(points: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(point[key], []).append(point)
    return found
