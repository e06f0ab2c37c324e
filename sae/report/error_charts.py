"""Where the SAE fails: bars with intervals by position in the context and by token class."""

from typing import Any

from sae.report.charts import MARK, MUTED, TEXT, WIDTH, Chart, spec_of, x_axis, y_axis
from sae.report.display import plain
from sae.report.numbers import decimal, interval, percent

_ROW_HEIGHT, _NAMES_WIDTH = 15, 92
_FROM, _TO = {"title": "95 % interval from"}, {"field": "high", "title": "to"}


def error_charts(evaluation: dict[str, Any]) -> list[Chart]:
    """FVU by position and by token class, and CE increase by position: those that were measured."""
    by = evaluation.get("error_by") or {}
    fvu, ce = evaluation.get("fvu"), evaluation.get("ce") or {}
    charts = []
    if len(groups := by.get("position") or []) > 1:
        charts.append(_columns(groups, "fvu", fvu, "FVU by position", "position in the context"))
    if len(groups := ce.get("increase_by_position") or []) > 1:
        charts.append(
            _columns(
                groups, "increase", ce["increase"], "CE increase by position", "position of the token that predicts"
            )
        )
    if len(groups := by.get("syntax_label") or []) > 1:
        charts.append(_rows(sorted(groups, key=lambda group: -(group["fvu"] or 0)), fvu, "FVU by syntax class"))
    if len(groups := by.get("token_frequency") or []) > 1:
        charts.append(_rows(groups, fvu, "FVU by token frequency"))
    return charts


def _columns(groups: list[dict[str, Any]], measure: str, whole: float | None, title: str, axis: str) -> Chart:
    """Upright bars, in the order of the groups."""
    values = _values(groups, measure)
    x = {
        "field": "name",
        "type": "ordinal",
        "sort": None,
        "title": axis,
        "axis": {"title": axis, "labelAngle": 0, "labelOverlap": False},
    }
    unit = "nats" if measure == "increase" else "FVU"
    spec = spec_of(values, {"type": "bar", "color": MARK}, x=x, y=y_axis("value", unit))
    spec["layer"] = [
        {"mark": spec.pop("mark"), "encoding": {"x": x, "y": y_axis("value", unit)}},
        {
            "mark": {"type": "rule", "color": TEXT},
            "encoding": {"x": x, "y": y_axis("low", unit) | _FROM, "y2": _TO},
        },
        *_whole(whole, "y"),
    ]
    del spec["encoding"]
    return _chart(groups, measure, whole, title, f"by {axis}, in bins that double", spec)


def _rows(groups: list[dict[str, Any]], whole: float | None, title: str) -> Chart:
    """Lying bars: names need room."""
    values = _values(groups, "fvu")
    room = {"minExtent": _NAMES_WIDTH, "labelLimit": _NAMES_WIDTH}
    axis = {"title": None, "domain": False, "ticks": False, **room}
    y = {"field": "name", "type": "ordinal", "sort": None, "title": "group", "axis": axis}
    spec = spec_of(values, {"type": "bar", "color": MARK})
    spec |= {"width": WIDTH - _NAMES_WIDTH, "height": {"step": _ROW_HEIGHT}}
    spec["layer"] = [
        {"mark": spec.pop("mark"), "encoding": {"y": y, "x": x_axis("value", "FVU")}},
        {
            "mark": {"type": "rule", "color": TEXT},
            "encoding": {"y": y, "x": x_axis("low", "FVU") | _FROM, "x2": _TO},
        },
        *_whole(whole, "x"),
    ]
    del spec["encoding"]
    spec["config"] = spec["config"] | {"axisX": {"grid": True}, "axisY": {"grid": False}}
    return _chart(groups, "fvu", whole, title, "by what kind of token it is", spec)


def _values(groups: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    values = []
    for group in groups:
        value = group[measure]
        low, high = group.get(f"{measure}_interval") or (value, value)
        values.append({"name": plain(group["name"], 30), "value": value, "low": low, "high": high})
    return values


def _whole(value: float | None, axis: str) -> list[dict[str, Any]]:
    """A dashed line at the value over all rows."""
    if value is None:
        return []
    return [
        {
            "data": {"values": [{}]},
            "mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3], "aria": False},
            "encoding": {axis: {"datum": value}},
        }
    ]


def _chart(
    groups: list[dict[str, Any]], measure: str, whole: float | None, title: str, divided: str, spec: dict[str, Any]
) -> Chart:
    is_fvu = measure == "fvu"
    rows = [
        (
            plain(group["name"], 60),
            f"{group['n_rows' if is_fvu else 'n_targets']:,}",
            decimal(group[measure]),
            interval(group.get(f"{measure}_interval")) or "n/a",
            *([percent(group.get("error_share"))] if is_fvu else []),
        )
        for group in groups
    ]
    columns = ("group", "rows" if is_fvu else "tokens", "FVU" if is_fvu else "nats", "95 % interval")
    return Chart(
        title,
        f"{divided}; thin lines are 95 % intervals, the dashed line is all {'rows' if is_fvu else 'tokens'}: "
        f"{decimal(whole)}",
        spec,
        (*columns, "share of the error") if is_fvu else columns,
        rows,
    )
