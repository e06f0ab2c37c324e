"""One walk through all views, from a disk and from a server, in every way a page is looked at."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sae.report.walk import WIDER, Walk

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 390, "height": 844}}
DARK = {"color_scheme": "dark"}


@pytest.fixture(scope="module")
def address(whole_report: Any, serve_folder: Callable[[Path], str]) -> str:
    """Where the report is served."""
    return serve_folder(whole_report.folder)


@pytest.mark.parametrize(
    "way",
    [{}, *(pytest.param(way, marks=pytest.mark.slow) for way in (PHONE | DARK, {"forced_colors": "active"}))],
    ids=["light", "phone", "forced"],
)
def test_journey_from_a_disk(way: dict[str, Any], whole_report: Any, visit: Callable[..., Any]) -> None:
    Walk(visit(whole_report.folder, **way).open()).go()


@pytest.mark.parametrize("way", [DARK, pytest.param(PHONE, marks=pytest.mark.slow)], ids=["dark", "phone"])
def test_journey_from_a_server(way: dict[str, Any], whole_report: Any, address: str, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder, address, **way)
    Walk(visited.open()).go()
    assert all(url.startswith(f"{address}/") for url in visited.requested)


def test_the_first_view_is_three_requests(whole_report: Any, address: str, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder, address)
    visited.open().wait_for_load_state("networkidle")
    names = [re.sub(r"\.[0-9a-f]{10}\.", ".", url.removeprefix(f"{address}/")) for url in visited.requested]
    assert sorted(names) == ["assets/app.css", "assets/app.js", "index.html"]


VIEWS = {
    "": ".random li",
    "#/latents": ".rows .row .t",
    "#/latent/17": ".contexts .t.peak",
    "#/map": "canvas.map",
    "#/compare": ".pair-list tr",
    "#/try": ".reading .t",
    "#/judge": ".contexts .t.peak",
    "#/s/toy/toy": ".heat td",
}


def test_every_view_is_on_paper(whole_report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder, viewport={"width": 718, "height": 1000})
    for address, there in VIEWS.items():
        page = visited.open(address)
        page.emulate_media(media="print")
        page.wait_for_selector(there, state="visible")
        assert not page.evaluate(WIDER), address
        assert not page.is_visible(".top")
        page.emulate_media(media="screen")
        page.goto("about:blank")


def test_a_printed_list_has_its_first_rows_and_says_how_many(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/latents?sort=id")
    page.wait_for_selector(".rows .row .t")
    on_screen = page.locator(".rows .row").count()
    page.emulate_media(media="print")
    page.wait_for_selector(".on-paper", state="visible")
    assert page.text_content(".on-paper") == "The first 200 of 300, as printed."
    page.wait_for_selector(".rows .row[data-id='199']")  # the words are there at once, the rows with the next picture
    tops = "rows => rows.map(row => [Number(row.dataset.id), row.getBoundingClientRect().top])"
    rows = page.eval_on_selector_all(".rows .row", tops)
    assert [latent for latent, _ in rows] == list(range(200))
    assert [top for _, top in rows] == sorted({top for _, top in rows})
    page.emulate_media(media="screen")
    page.wait_for_function("n => document.querySelectorAll('.rows .row').length === n", arg=on_screen)
