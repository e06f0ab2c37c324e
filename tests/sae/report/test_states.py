"""What is missing or damaged is named in its view, and the rest goes on; without script there is the overview."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sae.report.damage import assert_named, forgive_the_browser

pytestmark = pytest.mark.browser

VIEWS = {
    "data/large/latents/0": ("#/latent/0", ".contexts .t"),
    "data/large/col/order": ("#/latents", ".rows .row .t"),
    "data/large/labels/0": ("#/latents?q=label:import", ".rows .row .t"),
    "data/large/index/words/0": ("#/latents?q=self", ".rows .row .t"),
    "data/large/map": ("#/map", ".map-near li"),
    "data/large/col/map_x": ("#/map", ".map-near li"),
    "data/compare/large--small": ("#/compare/large/small", ".pair-list tr"),
    "data/compare/large--small/0-match": ("#/compare/large/small", ".pair-list tr"),
    "data/large/try": ("#/try", ".reading .t"),
    "data/large/try/0": ("#/try", ".reading .t"),
    "data/toy": ("#/s/toy/toy", ".heat td"),
}
"""A file, the view that cannot do without it, and what that view shows when the file is there."""
WITH_SCHEMA = (
    *("data/large/latents/0", "data/large/map", "data/large/try", "data/large/try/0"),
    "data/compare/large--small",
)
"""Those that say for which version of the page they were written."""


@pytest.mark.parametrize(
    "how", ["missing", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "schema"))]
)
def test_a_damaged_file_is_named_and_comes_back(
    how: str, whole_report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    views = {key: view for key, view in VIEWS.items() if how != "schema" or key in WITH_SCHEMA}
    folder = Path(shutil.copytree(whole_report.folder, tmp_path / "report"))
    assert_named(visit(folder), views, how, elsewhere="small")


def test_a_missing_file_beside_the_contexts_does_not_hide_them(
    whole_report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    """Rules of neighbours, the other SAEs, the pager: all come later than the contexts."""
    folder = Path(shutil.copytree(whole_report.folder, tmp_path / "report"))
    for key in ("data/large/labels/0", "data/large/col/order", "data/compare/large--small"):
        (folder / f"{key}.js").unlink()
    visited = visit(folder)
    page = visited.open("#/latent/17")
    page.wait_for_selector(".contexts .t.peak")
    page.wait_for_selector(".elsewhere dd:has-text('large--small.js is missing')")
    forgive_the_browser(visited)


def test_a_missing_column_leaves_the_list_and_is_named(
    whole_report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(whole_report.folder, tmp_path / "report"))
    (folder / "data/large/col/frequency.js").unlink()
    visited = visit(folder)
    page = visited.open("#/latents?sort=id")
    page.wait_for_selector(".rows .row .t")
    assert "data/large/col/frequency.js is missing" in page.text_content("[role=alert]:visible")
    assert page.text_content(".rows [data-id='0'] .freq") == ""
    forgive_the_browser(visited)


def test_the_second_script_missing_is_said(whole_report: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    folder = Path(shutil.copytree(whole_report.folder, tmp_path / "report"))
    (script,) = (folder / "assets").glob("views.*.js")
    script.unlink()
    visited = visit(folder)
    page = visited.open("#/map")
    assert f"assets/{script.name} is missing. Copy this file again" in page.text_content("[role=alert]")
    page.click("nav >> text=Latents")
    page.wait_for_selector(".rows .row .t")
    forgive_the_browser(visited)


def test_without_script_the_overview_is_read_and_the_tables_are_found(
    whole_report: Any, visit: Callable[..., Any]
) -> None:
    visited = visit(whole_report.folder, java_script_enabled=False)
    page = visited.page
    page.goto(f"file://{whole_report.folder}/index.html")
    said = page.locator("body").inner_text()
    for text in ("What ran", "3 SAEs", "FVU", ".195", "12 random live latents", "Lineage", "Scripts are off"):
        assert text in said, text
    assert not page.is_visible("nav")
    assert page.locator("svg.plot").count() >= 8
    assert page.locator(".random .t.peak").count() >= 12
    page.click("noscript a")
    assert page.url.endswith("tables/README.md")


def test_a_browser_that_is_too_old_gets_a_line(whole_report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder)
    visited.page.add_init_script("delete window.DecompressionStream")
    visited.page.goto(f"file://{whole_report.folder}/index.html")
    assert "This browser is too old" in visited.page.text_content("#main")
    assert visited.page.is_visible("#overview h1")
