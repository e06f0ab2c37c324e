"""What the overview says: every number beside its controls, and plots that show what they say."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.report import charts
from sae.report.charts import render_svg
from sae.report.error_charts import error_charts
from sae.report.headlines import signed


@pytest.fixture(scope="module")
def evaluation(synthetic: Any) -> dict[str, Any]:
    return {"fvu": 0.2, "error_by": synthetic.error_by(0.2), "ce": {"increase": 0.1}}


def text_of(page: str) -> str:
    """The page's text, as a reader without scripts or pictures gets it."""
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_headlines_stand_beside_their_controls(report: Any) -> None:
    text = text_of((report.folder / "index.html").read_text())
    assert re.search(
        r"FVU \.195 .*?untrained subject \.402 neurons \.378 PCA \.403 random \.756 the mean alone 1", text
    )
    assert re.search(r"CE increase \+\.139 nats .*?KL \.151 \(\.148 to \.154\)", text)
    assert re.search(
        r"untrained subject \+\.139 neurons \+\.692 PCA \+\.553 random \+2\.37 the mean alone \+2\.57", text
    )
    assert re.search(r"SAE latents raw neurons PCA random SAE, untrained subject", text)
    assert re.search(r"top tenth of activations 43\.1 % 9\.60 % 3\.90 % 1\.10 % 43\.1 %", text)
    assert "top tenth of activations: one token, current or previous" in text
    assert re.search(r"cosine to the nearest other \.300 \.150", text)
    assert re.search(r"γ about the mean \.987", text)


def test_probes_are_shown_with_their_ceiling_and_what_they_lose_is_said(report: Any) -> None:
    text = text_of((report.folder / "index.html").read_text())
    assert re.search(
        r"syntax class, 1 unit mean over 15 classes 71\.0 % F1 \.410 77\.0 % F1 \.470 75\.0 % F1 \.450 "
        r"62\.0 % F1 \.320 71\.0 % F1 \.410 95\.0 % F1 \.650",
        text,
    )
    assert "1 raw neuron tells the syntax class better than 1 latent: balanced accuracy 77.0 % against 71.0 %." in text
    assert "5 raw neurons tell" not in text
    assert "on 14,988 rows that chose nothing" in text


def test_what_was_not_measured_is_left_out(sweep_report: Any) -> None:
    page = (sweep_report.folder / "index.html").read_text()
    toy = text_of(page[page.index('data-sae="toy"') :])
    assert "CE increase n/a" in toy
    for absent in ("Sparse probing", "Where the error is", "Next-token prediction"):
        assert absent not in toy
    assert "Decoder geometry" in toy


def test_errors_are_drawn_and_listed(evaluation: dict[str, Any]) -> None:
    pytest.importorskip("vl_convert")
    position, syntax = error_charts(evaluation)
    assert [row[0] for row in position.rows] == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127"]
    assert position.rows[0] == ("0", "230", ".260", ".194 to .326", "8.00 %")
    assert [row[0] for row in syntax.rows][:2] == ["function name", "name"], "the worst first"
    for chart in (position, syntax):
        svg = render_svg(chart)
        assert svg is not None
        assert len(re.findall(r'<path [^>]*fill="var\(--mark\)"', svg)) == len(chart.rows)
        # An interval for each group, and the line over all.
        assert len(re.findall(r'<line [^>]*stroke="var\(--text\)"', svg)) >= len(chart.rows)
        assert "stroke-dasharray" in svg
        assert "#f00d" not in svg


def test_bars_are_as_long_as_their_values(evaluation: dict[str, Any]) -> None:
    pytest.importorskip("vl_convert")
    position = error_charts(evaluation)[0]
    svg = render_svg(position) or ""
    bars = re.findall(r'<path d="M[^"]*?v([\d.]+)h[^"]*" fill="var\(--mark\)"', svg)
    heights = [float(height) for height in bars]
    values = [value["value"] for value in position.spec["data"]["values"]]
    assert len(heights) == 8
    for height, value in zip(heights, values, strict=True):
        assert height / heights[0] == pytest.approx(value / values[0], rel=1e-3)


def test_frequency_tenths_keep_their_order() -> None:
    groups = [
        {"name": f"tenth {i}", "n_rows": 10, "fvu": 0.1 * i, "fvu_interval": None, "error_share": 0.5}
        for i in (1, 2, 3)
    ]
    (chart,) = error_charts({"fvu": 0.2, "error_by": {"token_frequency": groups}, "ce": None})
    assert [row[0] for row in chart.rows] == ["tenth 1", "tenth 2", "tenth 3"]
    assert chart.rows[0][3] == "n/a"


def test_nothing_is_drawn_of_a_single_group_or_of_no_measurement() -> None:
    one = {"name": "0", "n_rows": 3, "fvu": 0.1, "fvu_interval": None, "error_share": 1.0}
    assert error_charts({"fvu": 0.1, "error_by": {"position": [one]}, "ce": None}) == []
    assert error_charts({}) == []


def test_a_sweep_shows_both_trade_offs(render: Callable[..., Any], synthetic: Any) -> None:
    from sae.report.overview import sweep_plots
    from sae.report.render import open_inputs

    found = render(n_latents=40, sweep=True)
    with open_inputs(found.storage, found.spec) as saes:
        (only_fvu,) = sweep_plots(saes)
        assert only_fvu.chart.columns[3] == "FVU", "the toy has no CE"
        both = sweep_plots([saes[0], saes[0]])
    assert [plot.chart.columns[3] for plot in both] == ["FVU", "CE increase"]
    assert both[1].chart.rows[0][3] == ".139"


def test_hostile_names_of_groups_are_text(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    groups = [
        {"name": name, "n_rows": 10, "fvu": 0.1, "fvu_interval": None, "error_share": 0.5}
        for name in ("<script>alert(1)</script>", "</svg><img src=x>")
    ]
    (chart,) = error_charts({"fvu": 0.2, "error_by": {"syntax_label": groups}, "ce": None})
    svg = render_svg(chart) or ""
    assert "<script" not in svg
    assert "<img" not in svg


def test_every_colour_of_a_chart_is_a_variable(evaluation: dict[str, Any]) -> None:
    for chart in error_charts(evaluation):
        colours = set(re.findall(r'"(#[0-9a-f]{6})"', json.dumps(chart.spec)))
        assert colours
        assert colours <= set(charts._VARIABLES)


@pytest.mark.parametrize(("value", "text"), [(0.121, "+.121"), (-0.02, "-.0200"), (0.0, "0"), (None, "n/a")])
def test_differences_carry_their_sign(value: float | None, text: str) -> None:
    assert signed(value) == text


def touch(page: Any, title: str) -> Any:
    """Put the pointer on a plot and wait until it is alive."""
    figure = page.locator(f".plot-figure:has(h3:text-is('{title}'))")
    figure.locator("svg.plot").scroll_into_view_if_needed()
    figure.locator("svg.plot").hover()
    page.wait_for_function("f => f.classList.contains('live')", arg=figure.element_handle(), timeout=20_000)
    return figure


@pytest.mark.browser
def test_a_plot_comes_alive_when_it_is_touched(report: Any, visit: Callable[..., Any]) -> None:
    pytest.importorskip("vl_convert")
    page = visit(report.folder).open()
    assert page.evaluate("typeof vegaEmbed") == "undefined", "nothing of it is loaded before"
    before = page.locator(".plot-figure:has(h3:text-is('FVU by position')) svg.plot")
    size = before.bounding_box()
    colour = "e => getComputedStyle(e.querySelector('.mark-rect path')).fill"
    drawn = before.evaluate(colour)
    figure = touch(page, "FVU by position")
    live = figure.locator(".plot > svg")
    assert live.bounding_box()["height"] == pytest.approx(size["height"], abs=6)
    assert live.evaluate(colour) == drawn == "rgb(181, 101, 29)"
    figure.locator("[aria-roledescription=bar]").nth(2).hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert re.search(r"2-3\b.*0\.234", tooltip.inner_text(), re.DOTALL)
    page.keyboard.press("t")
    assert live.evaluate(colour) == "rgb(221, 143, 60)", "the theme reaches a live plot"


@pytest.mark.browser
def test_a_click_on_a_bar_lists_its_latents(report: Any, visit: Callable[..., Any]) -> None:
    pytest.importorskip("vl_convert")
    page = visit(report.folder).open()
    figure = touch(page, "Firing frequency")
    bar = figure.locator("[aria-roledescription=bar]").nth(9)
    (n_latents,) = re.findall(r"latents: (\d+)", bar.get_attribute("aria-label"))
    bar.click()
    page.wait_for_function(
        "n => document.querySelector('#n-results')?.textContent.startsWith(n)", arg=f"{n_latents} of "
    )


@pytest.mark.browser
def test_a_click_in_a_sweeps_legend_leaves_one_family(sweep_report: Any, visit: Callable[..., Any]) -> None:
    pytest.importorskip("vl_convert")
    page = visit(sweep_report.folder, viewport={"width": 390, "height": 844}).open()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    figure = touch(page, "FVU against L0")
    assert "Click a family of the legend" in figure.locator(".note").first.inner_text()
    marks = figure.locator(".mark-symbol.role-mark path")
    opacities = "all => all.map(e => Number(e.getAttribute('opacity') ?? 1))"
    assert marks.evaluate_all(opacities) == [1, 1]
    figure.locator(".role-legend-label text >> text=toy").click()
    page.wait_for_function("e => Number(e.getAttribute('opacity')) < 1", arg=marks.first.element_handle())
    assert marks.evaluate_all(opacities) == [0.1, 1]
    marks.last.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert re.search(r"SAE\s+toy.*k 1.*0\.02", tooltip.inner_text(), re.DOTALL)


@pytest.mark.browser
def test_without_vega_the_picture_stays(report: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    pytest.importorskip("vl_convert")
    folder = Path(shutil.copytree(report.folder, tmp_path / "report"))
    next((folder / "assets").glob("vega.*")).unlink()
    opened = visit(folder)
    page = opened.open()
    svg = page.locator("svg.plot").first
    svg.scroll_into_view_if_needed()
    svg.hover()
    page.wait_for_function("document.querySelector('.plot-figure:not([data-touched])')")
    page.wait_for_timeout(200)
    assert page.locator("svg.plot").first.is_visible()
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in opened.problems)
    opened.problems.clear()


@pytest.mark.browser
def test_hostile_names_stay_text_in_a_live_plot(
    render: Callable[..., Any], synthetic: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    pytest.importorskip("vl_convert")
    from sae.report.live_plots import live_spec, write_live_plots
    from sae.report.overview import _draw

    found = render(n_latents=40)
    folder = Path(shutil.copytree(found.folder, tmp_path / "report"))
    names = ("<img src=x onerror=window.PWN=1>", "</script><script>window.PWN=1</script>")
    groups = [{"name": n, "n_rows": 10, "fvu": 0.1, "fvu_interval": None, "error_share": 0.5} for n in names]
    (chart,) = error_charts({"fvu": 0.2, "error_by": {"syntax_label": groups}, "ce": None})
    (plot,) = _draw("topk-24-error", [chart])
    assert write_live_plots(folder, {plot.id: chart}) is not None
    assert "var(--mark)" in json.dumps(live_spec(chart))
    page = visit(folder).open()
    figure = touch(page, "FVU by position")
    figure.locator("[aria-roledescription=bar]").first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "img" in tooltip.inner_text()
    assert tooltip.locator("img, script").count() == 0
    assert page.evaluate("window.PWN") is None
