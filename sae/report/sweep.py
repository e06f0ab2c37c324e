"""The plots of a sweep: a measure against L0, by architecture and width."""

from typing import Any

from sae.report.charts import MARK, MUTED, TEXT, Chart, spec_of, x_axis, y_axis
from sae.report.numbers import decimal

SWEEP_MEASURES = {
    "fvu": ("FVU", "FVU"),
    "increase": ("CE increase", "CE increase, nats"),
}
"""Measure -> its name, and the title of its axis."""
MAX_NAMED = 8
"""Points of a sweep that are named one by one; of more only the families are."""


def sweep_point(
    name: str, architecture: str, d_sae: int, seed: int, l0: float, hook_point: str | None = None
) -> dict[str, Any]:
    """What `sweep_chart` must know of one SAE beside its measure.

    Args:
        name: as the plan makes it, any seed at the end.
        hook_point: where the sweep has several.
    """
    return {
        "name": name,
        "family": f"{architecture} {d_sae:,}" + (f", {hook_point}" if hook_point else ""),
        "setting": name.removesuffix(f"-seed{seed}"),
        "l0": l0,
    }


def sweep_chart(points: list[dict[str, Any]], measure: str = "fvu") -> Chart:
    """A measure against L0 of all SAEs of the report, with the Pareto line and one line per family.

    Args:
        points: of `sweep_point`, with the measure, "low" and "high" each. A family is an architecture and a width (on
            one hook point); its line goes through the means over seeds.
        measure: of SWEEP_MEASURES.
    """
    name, title = SWEEP_MEASURES[measure]
    front, families = pareto(points, measure), family_lines(points, measure)
    base = spec_of(
        points,
        {"type": "point", "filled": True, "size": 60, "color": MARK, "opacity": 1},
        x={**x_axis("l0", "L0 (log)"), "scale": {"type": "log", "nice": False, "padding": 24}},
        y={**y_axis(measure, title), "scale": {"zero": False}},
    )
    x, y = base["encoding"]["x"], base["encoding"]["y"]
    pareto_line = {"type": "line", "color": MARK, "strokeWidth": 1, "strokeDash": [4, 3], "interpolate": "step-after"}
    label = {"type": "text", "dy": -10, "color": TEXT, "fontSize": 11}
    joining: list[dict[str, Any]] = []
    if families:
        each = {"detail": {"field": "family", "type": "nominal"}}
        thin = {"type": "line", "color": MUTED, "strokeWidth": 1}
        joining = [{"data": {"values": families}, "mark": thin, "encoding": each}]
    named: list[dict[str, Any]] = []
    if len(points) <= MAX_NAMED:
        named = [{"mark": label, "encoding": {"text": {"field": "name", "type": "nominal"}}}]
    elif families:
        ends = [line[-1] for line in _by(families, "family").values()]
        named = [
            {"data": {"values": ends}, "mark": label, "encoding": {"text": {"field": "family", "type": "nominal"}}}
        ]
    base["layer"] = [
        {"data": {"values": front}, "mark": pareto_line},
        *joining,
        {"mark": {"type": "rule", "color": MUTED}, "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
        {"mark": base.pop("mark")},
        *named,
    ]
    base["encoding"] = {"x": x, "y": y}
    joined = "; a solid line joins SAEs of one architecture and width, the mean over seeds" if families else ""
    return Chart(
        f"Sweep: {name} against L0",
        "one point per SAE with its 95 % interval; lower left is better; the dashed line joins those that no other "
        f"beats in both{joined}",
        base,
        ("SAE", "L0", name, "on the line", "family"),
        [
            (str(p["name"]), decimal(p["l0"]), decimal(p[measure]), "yes" if p in front else "no", str(p["family"]))
            for p in points
        ],
    )


def family_lines(points: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """For every family with several settings the mean L0 and measure of each over its seeds, by L0."""
    lines = []
    for family, members in _by(points, "family").items():
        settings = _by(members, "setting").values()
        line = [
            {"family": family, **{key: sum(p[key] for p in same) / len(same) for key in ("l0", measure)}}
            for same in settings
        ]
        if len(line) > 1:
            lines += sorted(line, key=lambda p: p["l0"])
    return lines


def _by(points: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(point[key], []).append(point)
    return found


def pareto(points: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """The points that no other equals or beats in both L0 and the measure, by L0."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["l0"], p[measure])):
        if not front or point[measure] < front[-1][measure]:
            front.append(point)
    return front
