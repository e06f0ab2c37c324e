"""Plots that answer the pointer: Vega as one file beside the page, and the specs that the pictures were drawn from.

The page loads both when a plot is touched first. Vega runs its expressions in its own interpreter (`ast` in plots.js),
so the page's policy needs no `unsafe-eval`.
"""

import copy
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.report import charts, chunks
from sae.report.assets import write_asset

PLOTS_KEY = "data/plots"


def write_live_plots(folder: Path, found: Mapping[str, charts.Chart]) -> str | None:
    """Write Vega and the specs of the charts, by their id in the page.

    Returns: the name of Vega's file in assets/; None without vl-convert or without charts.
    """
    try:
        vl_convert = importlib.import_module("vl_convert")
    except ImportError:
        return None
    if not found:
        return None
    chunks.write_chunk(folder, PLOTS_KEY, chunks.encode_json({name: live_spec(found[name]) for name in found}))
    bundle: str = vl_convert.javascript_bundle(vl_version=charts.VEGA_LITE)
    # The bundle declares names at its top level, which would be everybody's; what the page needs it puts on `window`.
    return write_asset(folder, "vega", f"(() => {{\n{bundle}\n}})();\n".encode(), "js")


def live_spec(chart: charts.Chart) -> dict[str, Any]:
    """The chart's spec with tooltips, its colours as the page's variables."""
    spec = copy.deepcopy(chart.spec)
    spec["config"] |= {"mark": {"tooltip": {"content": "encoding"}}, "tooltipFormat": {"numberFormat": ".4~g"}}
    return dict(json.loads(charts.with_variables(json.dumps(spec))))
