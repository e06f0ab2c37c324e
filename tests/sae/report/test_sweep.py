"""The plots of sweeps: who is joined with whom, who is beaten, and names that can be told apart and read."""

import re
from types import ModuleType
from typing import Any

import pytest

from sae.report.charts import CATEGORIES, render_svg
from sae.report.sweep import MAX_IN_LEGEND, SHAPES, family_lines, l0_ticks, pareto, sweep_chart, sweep_point
from tests.sae.report.conftest import import_beside

Points = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made_up(synthetic: ModuleType) -> ModuleType:
    return import_beside("synthetic_sweep")


def point(name: str, l0: float, fvu: float, family: str = "topk 64", sparsity: str = "") -> dict[str, Any]:
    return sweep_point(name, family, sparsity or name, l0, "fvu", fvu, (fvu - 0.01, fvu + 0.01))


def test_the_pareto_line_joins_what_no_other_beats() -> None:
    points = [point("a", 8, 0.3), point("b", 16, 0.35), point("c", 16, 0.2), point("d", 32, 0.2), point("e", 64, 0.1)]
    assert [p["name"] for p in pareto(points, "fvu")] == ["a", "c", "e"]
    assert [row[4] for row in sweep_chart(points).rows] == ["yes", "no", "yes", "no", "yes"]


def test_a_line_joins_the_sparsities_of_a_family_by_their_means_over_seeds() -> None:
    points = [
        point("k8-seed0", 8, 0.3, sparsity="k 8"),
        point("k8-seed1", 10, 0.4, sparsity="k 8"),
        point("k16", 16, 0.2, sparsity="k 16"),
        point("wide", 8, 0.1, "topk 128", "k 8"),
    ]
    assert family_lines(points, "fvu") == [
        {"family": "topk 64", "l0": 9, "fvu": pytest.approx(0.35)},
        {"family": "topk 64", "l0": 16, "fvu": 0.2},
    ]
    chart = sweep_chart(points)
    assert "a solid line joins those of one family, more and less sparse, by means over seeds" in chart.description
    assert [row[1] for row in chart.rows] == ["topk 64"] * 3 + ["topk 128"]
    assert "seeds" not in sweep_chart(points[1:]).description
    assert "solid line" not in sweep_chart(points[2:]).description


def places_of(svg: str, text: str) -> list[tuple[float, float]]:
    """Where the parts of an SVG with this pattern of text stand; Vega nests groups, each moved by a `transform`."""
    found, moved = [], [(0.0, 0.0)]
    for tag in re.findall(r"<(/?)(g|text|svg|path|line)\b([^>]*?)(/?)>([^<]*)", svg):
        closing, name, attributes, single, content = tag
        if closing:
            if name == "g":
                moved.pop()
            continue
        shift = re.search(r"translate\((-?[\d.]+),(-?[\d.]+)\)", attributes)
        at = tuple(a + float(b) for a, b in zip(moved[-1], shift.groups() if shift else (0, 0), strict=True))
        if name == "g" and not single:
            moved.append(at)  # type: ignore[arg-type]
        if name == "text" and re.fullmatch(text, content):
            found.append(at)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("n_saes", [8, 24, 64])
def test_every_family_stands_in_the_legend_and_no_name_overlaps_another(made_up: ModuleType, n_saes: int) -> None:
    pytest.importorskip("vl_convert")
    configs = made_up.sweep_configs(made_up.GRIDS[n_saes])
    assert len(configs) == n_saes
    points = made_up.sweep_points(configs)
    families = list(dict.fromkeys(p["family"] for p in points))
    svg = render_svg(sweep_chart(points)) or ""
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', svg)
    assert float(width) <= 410, "wider than the narrowest screen bears"
    labels = {family: places_of(svg, re.escape(family)) for family in families}
    assert all(len(places) == 1 for places in labels.values()), labels
    boxes = [(x, y, x + 6.5 * len(family)) for family, ((x, y),) in labels.items()]
    for i, (left, y, right) in enumerate(boxes):
        assert right <= float(width)
        for other_left, other_y, other_right in boxes[:i]:
            assert abs(y - other_y) >= 10 or right < other_left or other_right < left
    assert not any(f">{p['name']}<" in svg for p in points), "names are for the table and the pointer"


def test_thirty_families_look_different_and_more_are_counted(made_up: ModuleType) -> None:
    points = [point(f"{i}", 8 + i, 0.3, family=f"family {i}") for i in range(40)]
    chart = sweep_chart(points)
    (marks,) = [layer for layer in chart.spec["layer"] if layer["mark"]["type"] == "point"]
    colours, shapes = (each["scale"]["range"] for each in (chart.spec["encoding"]["color"], marks["encoding"]["shape"]))
    assert len(set(zip(colours, shapes, strict=True))) == MAX_IN_LEGEND == len(CATEGORIES) * len(SHAPES) == 30
    if svg := render_svg(chart):
        assert ">family 20<" in svg
        assert ">family 35<" not in svg
        assert "entries" in svg


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (7, 73, [10, 20, 50]),
        (20, 40, [20, 25, 30, 40]),
        (14.4, 27.6, [15, 20, 25]),
        (14, 74, [15, 20, 30, 50, 70]),
        (0.8, 900, [1, 10, 100]),
        (21, 28, [25]),
        (15.1, 20.1, [17, 20]),
    ],
)
def test_ticks_of_l0_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert l0_ticks(low, high) == pytest.approx(ticks)
