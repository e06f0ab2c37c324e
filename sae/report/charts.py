"""The overview's plots: Vega-Lite specs as plain dicts, one builder per plot, rendered to inline SVG.

Colours are written as placeholders that become CSS variables in the SVG, so one rendering serves the light and the
dark theme. Every chart carries its data as a table: for screen readers, and for installations without vl-convert.
"""

import html
import importlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from sae.report.numbers import compact, decimal

HOW_TO_GET_PLOTS = "Plots need vl-convert: install sae-pipeline with the extra `report` and render the report again."
VEGA_LITE = "6.4"
WIDTH, HEIGHT = 300, 150
_BIN = 0.25
"""Width of the bins of log10 frequency, in decades."""
_MAX_POINTS = 160
"""Points of a training curve."""

_VARIABLES = {
    "#f00d01": "var(--text)",
    "#f00d02": "var(--muted)",
    "#f00d03": "var(--line)",
    "#f00d04": "var(--mark)",
    **{f"#f00d1{step}": f"var(--a{step})" for step in range(1, 7)},
    **{f"#f00d2{n}": f"var(--c{n})" for n in range(1, 7)},
}
_LIGHT = (
    *("#1b1f24", "#57606a", "#dfe3e8", "#b5651d"),
    *("#fff1de", "#fce0be", "#facf9e", "#f7bc7d", "#f4a95a", "#f1952f"),
    *("#b5651d", "#55669d", "#439e8e", "#6e0b24", "#a167f1", "#3b059b"),
)
"""What the variables are in the light theme (style/base.css)."""
TEXT, MUTED, LINE, MARK = list(_VARIABLES)[:4]
_STEPS = list(_VARIABLES)[4:10]
CATEGORIES = tuple(_VARIABLES)[10:]
"""Colours of things without an order; apart also to those who see no red, no green or no blue."""


@dataclass(frozen=True)
class Chart:
    """One plot: what it shows in words, its Vega-Lite spec and its data as a table."""

    title: str
    description: str
    """One line for people who do not see it; also its accessible name."""
    spec: dict[str, Any]
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    legend: list[tuple[int, str]] = field(default_factory=list)
    """(colour step, label)."""


_OUTLINES = ((TEXT, [1, 0]), (MUTED, [4, 2]))
"""Colour and dashes of the controls' outlines, in their order."""


_EMPTY_PATH = re.compile(r'<path class="(?:background|foreground)" aria-hidden="true" d="(?:M0,0h0v0h0Z)?"[^>]*/>')
_MARK_NAMES = re.compile(r' (?:aria-[a-z]+|role)="[^"]*"')
_DEFAULTS = ('pointer-events="none"', 'opacity="1"', 'stroke-width="1"', 'font-weight="normal"')
_GEOMETRY = re.compile(r' (?:d|transform|x[12]?|y[12]?|width|height)="[^"]*"')
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")


def render_svg(chart: Chart) -> str | None:
    """The chart as SVG text for inlining; None without vl-convert."""
    try:
        vl_convert = importlib.import_module("vl_convert")
    except ImportError:
        return None
    svg = slim(with_variables(vl_convert.vegalite_to_svg(chart.spec, vl_version=VEGA_LITE)))
    opening = re.compile(r'<svg[^>]*?width="([\d.]+)" height="([\d.]+)"[^>]*>')
    label = html.escape(f"{chart.title}. {chart.description}", quote=True)
    return opening.sub(
        lambda found: (
            f'<svg class="plot" role="img" aria-label="{label}" viewBox="0 0 {found[1]} {found[2]}" '
            f'style="max-width:{found[1]}px">'
        ),
        svg,
        count=1,
    )


def slim(svg: str) -> str:
    """Vega's SVG, half as long: without empty paths, defaults written out, and digits below a hundredth of a pixel.

    Names of marks go too: the whole is one image to a screen reader, and its numbers are in the table below it.
    """
    svg = _MARK_NAMES.sub("", _EMPTY_PATH.sub("", svg))
    for attribute in _DEFAULTS:
        svg = svg.replace(f" {attribute}", "")
    return _GEOMETRY.sub(lambda attribute: _LONG_NUMBER.sub(_rounded, attribute[0]), svg)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def with_variables(text: str) -> str:
    """SVG or JSON with the placeholders of colours as CSS variables."""
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(f'"{placeholder}"', f'"{variable}"')
    return text


def render_png(chart: Chart) -> bytes | None:
    """The chart as a PNG in the light theme, for places without the page's stylesheet; None without vl-convert."""
    try:
        vl_convert = importlib.import_module("vl_convert")
    except ImportError:
        return None
    spec = json.dumps(chart.spec | {"background": "#ffffff"})
    for placeholder, colour in zip(_VARIABLES, _LIGHT, strict=True):
        spec = spec.replace(f'"{placeholder}"', f'"{colour}"')
    png: bytes = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
    return png


def density_chart(frequency: np.ndarray, n_rows: int, controls: Mapping[str, np.ndarray] | None = None) -> Chart:
    """Histogram of log10 firing frequency of the live latents, with those of controls as outlines.

    Args:
        frequency: [d_sae]
        controls: name -> firing frequencies of its units; scaled to as many live units as there are live latents.
    """
    live = frequency[frequency > 0]
    outlines = {name: found[found > 0] for name, found in (controls or {}).items() if (found > 0).any()}
    bins = _decades(np.concatenate([live, *outlines.values()]))
    counts, edges = np.histogram(np.log10(live), bins)
    values = [
        {"from": float(low), "to": float(high), "n": int(n)}
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    x = {**x_axis("from", "log₁₀ firing frequency", _half_decades(edges)), "bin": {"binned": True, "step": _BIN}}
    spec = spec_of(
        values, {"type": "bar", "color": MARK, "binSpacing": 1}, x=x, x2={"field": "to"}, y=y_axis("n", "latents")
    )
    columns = {}
    if outlines:
        spec["layer"] = [{"mark": spec.pop("mark"), "encoding": spec.pop("encoding")}]
    for (name, found), (colour, dash) in zip(outlines.items(), _OUTLINES, strict=False):
        columns[name] = np.histogram(np.log10(found), bins)[0] * len(live) / len(found)
        steps = np.repeat(columns[name], 2)
        line = [{"x": float(at), "y": float(n)} for at, n in zip(np.repeat(edges, 2)[1:-1], steps, strict=True)]
        mark = {"type": "line", "color": colour, "strokeWidth": 1.5, "strokeDash": dash}
        place = {name: {"field": name, "type": "quantitative"} for name in ("x", "y")}
        spec["layer"].append({"data": {"values": line}, "mark": mark, "encoding": place})
    spec["usermeta"] = {"filter": {"freq": ["from", "to"]}}
    lines = "; ".join(f"{how}: {name}" for name, how in zip(outlines, ("line", "dashed"), strict=False))
    return Chart(
        "Firing frequency",
        f"{len(live):,} live latents by log10 of the share of {n_rows:,} tokens on which they fire",
        spec,
        ("log₁₀ frequency", "latents", *columns),
        [
            (f"{v['from']:.2f} to {v['to']:.2f}", f"{v['n']:,}", *(f"{found[i]:,.0f}" for found in columns.values()))
            for i, v in enumerate(values)
            if v["n"] or any(found[i] for found in columns.values())
        ],
        note=f"{len(frequency) - len(live):,} latents never fired and are not in the plot."
        + (f" {lines[0].upper()}{lines[1:]}, scaled to as many units, on held-out tokens." if lines else ""),
    )


def activation_chart(frequency: np.ndarray, mean_act: np.ndarray) -> Chart:
    """2-d histogram of mean activation by frequency, both logarithmic. [d_sae] each."""
    keep = (frequency > 0) & np.isfinite(mean_act) & (mean_act > 0)
    x, y = np.log10(frequency[keep]), np.log10(mean_act[keep])
    y_edges = np.arange(math.floor(y.min() * 8) / 8, y.max() + 0.125, 0.125) if len(y) else np.array([0.0, 1.0])
    counts, x_edges, y_edges = np.histogram2d(x, y, [_decades(frequency[keep]), y_edges])
    limits = sorted({math.ceil(counts.max() ** (step / 6)) for step in range(1, 6)} - {1}) or [2]
    values = [
        {"x": x_edges[i], "x2": x_edges[i + 1], "y": y_edges[j], "y2": y_edges[j + 1], "n": int(counts[i, j])}
        for i, j in np.argwhere(counts > 0)
    ]
    steps = _STEPS[-len(limits) - 1 :]
    spec = spec_of(
        values,
        {"type": "rect"},
        x={**x_axis("x", "log₁₀ firing frequency", _half_decades(x_edges)), "scale": {"zero": False, "nice": False}},
        x2={"field": "x2"},
        y={**y_axis("y", "log₁₀ mean activation"), "scale": {"zero": False, "nice": False}},
        y2={"field": "y2"},
        color={
            "field": "n",
            "type": "quantitative",
            "title": "latents",
            "scale": {"type": "threshold", "domain": limits, "range": steps},
            "legend": None,
        },
    )
    bounds = [1, *limits, int(counts.max()) + 1]
    legend = [
        (7 - len(steps) + k, f"{low}" if high - low <= 1 else f"{low}–{high - 1}")
        for k, (low, high) in enumerate(itertools.pairwise(bounds))
        if high > low
    ]
    spec["usermeta"] = {"filter": {"freq": ["x", "x2"], "mean": ["y", "y2"]}}
    return Chart(
        "Mean activation by frequency",
        "rare and strong latents lie at the upper left, dense and weak ones at the lower right",
        spec,
        ("log₁₀ frequency", "log₁₀ mean activation", "latents"),
        [(f"{v['x']:.2f}", f"{v['y']:.2f}", f"{v['n']:,}") for v in values],
        legend=legend,
    )


def training_charts(metrics: pa.Table) -> list[Chart]:
    """FVU, L0 and dead latents by training tokens, with the final value at the line's end."""
    wanted = {
        "fvu": ("FVU in training", "fraction of variance unexplained, per logged batch"),
        "l0": ("L0 in training", "latents that fire per token"),
        "dead": ("Dead share in training", "share of latents that had not fired for the configured number of tokens"),
    }
    charts = []
    for name, (title, description) in wanted.items():
        if name not in metrics.column_names or metrics.num_rows < 2:
            continue
        charts.append(_curve(metrics["n_tokens"].to_pylist(), metrics[name].to_pylist(), title, description))
    return charts


def _curve(tokens: list[int], values: list[float], title: str, description: str) -> Chart:
    kept = sorted({round(i) for i in np.linspace(0, len(tokens) - 1, min(len(tokens), _MAX_POINTS))})
    points = [
        {"x": tokens[i] / 1e6, "y": float(values[i])}
        for i in kept
        if values[i] is not None and math.isfinite(values[i])
    ]
    if not points:
        points = [{"x": 0.0, "y": 0.0}]
    last = points[-1]
    million = tokens[-1] >= 1_000_000
    unit = 1.0 if million else 1e3
    points = [{"x": p["x"] * unit, "y": p["y"]} for p in points]
    spec = spec_of(
        points,
        {"type": "line", "color": MARK, "strokeWidth": 1.5},
        x={**x_axis("x", "million tokens" if million else "thousand tokens"), "scale": {"nice": False}},
        y=y_axis("y", None) | {"scale": {"domain": [0, max([p["y"] for p in points]) or 1], "nice": True}},
    )
    end = {"values": [{"x": last["x"] * unit, "y": last["y"], "label": decimal(last["y"])}]}
    encoding = spec["encoding"]
    spec["layer"] = [
        {"mark": spec.pop("mark")},
        {"data": end, "mark": {"type": "point", "filled": True, "size": 30, "color": MARK, "opacity": 1}},
        {
            "data": end,
            "mark": {"type": "text", "align": "right", "dy": -9, "fontSize": 12, "fontWeight": 600, "color": TEXT},
            "encoding": {"text": {"field": "label", "type": "nominal"}},
        },
    ]
    spec["encoding"] = {"x": encoding["x"], "y": encoding["y"]}
    every = max(1, len(points) // 12)
    return Chart(
        title,
        f"{description}; {decimal(last['y'])} at the end, {compact(tokens[-1])} tokens",
        spec,
        ("tokens", "value"),
        [(compact(round(p["x"] / unit * 1e6)), decimal(p["y"])) for p in [*points[:-1:every], points[-1]]],
    )


def _decades(frequency: np.ndarray) -> np.ndarray:
    """Edges of the bins of log10 frequency, aligned to quarters of a decade, up to 0."""
    low = math.floor(float(np.log10(frequency.min())) / _BIN) if len(frequency) else -4
    return np.arange(min(low, -1), 1) * _BIN


def spec_of(values: list[dict[str, Any]], mark: dict[str, Any], **encoding: Any) -> dict[str, Any]:
    """A Vega-Lite spec of one mark in the page's style."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": WIDTH,
        "height": HEIGHT,
        "padding": 4,
        "background": None,
        "data": {"values": values},
        "mark": mark,
        "encoding": encoding,
        "config": {
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                "domainColor": LINE,
                "tickColor": LINE,
                "gridColor": LINE,
                "labelColor": MUTED,
                "titleColor": MUTED,
                "labelFontSize": 11,
                "titleFontSize": 11,
                "titleFontWeight": "normal",
                "titlePadding": 6,
                "tickSize": 4,
            },
            "axisX": {"grid": False},
        },
    }


def _half_decades(edges: np.ndarray) -> list[float]:
    """Ticks at whole decades, or at halves where there are few."""
    step = 1.0 if edges[-1] - edges[0] > 4 else 0.5
    return [float(tick) for tick in np.arange(math.ceil(edges[0] / step), 1) * step]


def x_axis(name: str, title: str, ticks: list[float] | None = None) -> dict[str, Any]:
    """A quantitative field along x."""
    axis = {"title": title, "tickCount": 6} | ({"values": ticks} if ticks else {})
    return {"field": name, "type": "quantitative", "axis": axis} | ({"title": title} if title else {})


def y_axis(name: str, title: str | None) -> dict[str, Any]:
    """A quantitative field along y."""
    axis = {"title": title, "tickCount": 4, "domain": False}
    return {"field": name, "type": "quantitative", "axis": axis} | ({"title": title} if title else {})
