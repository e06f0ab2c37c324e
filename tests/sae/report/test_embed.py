"""One latent in a frame of another page: without header, in the theme asked for, and no trouble to its host."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

BACKGROUND = "getComputedStyle(document.documentElement).backgroundColor"
WHITE, BLACK = "rgb(255, 255, 255)", "rgb(21, 24, 28)"
HOST = """<!doctype html><meta charset="utf-8"><title>notes</title>
<input id="notes"><iframe src="index.html#/s/small/embed/latent/17" width="700" height="500"></iframe>"""


def test_the_latent_is_alone_and_complete(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/embed/latent/17")
    assert page.text_content("#view h1") == "Latent 17"
    assert page.locator("header, nav, .skip, #overview, .pager, [role=search]").locator("visible=true").count() == 0
    assert page.locator(".contexts .t.peak").count() > 20
    assert page.locator("aside section").count() > 5
    page.evaluate("location.hash = '#/latent/17'")
    page.wait_for_selector("header nav", state="visible")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_theme_is_the_addresss_else_the_hosts(system: str, whole_report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder, color_scheme=system)
    for theme, colour in (("light", WHITE), ("dark", BLACK), ("", WHITE if system == "light" else BLACK)):
        page = visited.open(f"#/s/large/embed/latent/17?theme={theme}")
        assert page.evaluate(BACKGROUND) == colour
        assert page.evaluate("localStorage.getItem('sae-report-theme')") is None
        page.goto("about:blank")


def test_a_theme_chosen_in_the_report_stays_there(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder, color_scheme="light").open("#/latent/17")
    page.keyboard.press("t")
    assert page.evaluate(BACKGROUND) == BLACK
    page.evaluate("location.hash = '#/embed/latent/17'")
    page.wait_for_selector("header", state="hidden")
    assert page.evaluate(BACKGROUND) == WHITE
    page.evaluate("location.hash = '#/latent/18'")
    page.wait_for_selector("header", state="visible")
    assert page.evaluate(BACKGROUND) == BLACK


def test_width_and_theme_stay_in_its_address(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/s/large/embed/latent/17?theme=dark")
    page.click(".widths [data-w='16']")
    assert page.url.endswith("#/s/large/embed/latent/17?w=16&theme=dark")
    page.reload()
    page.wait_for_selector(".contexts .t")
    assert page.get_attribute(".widths [data-w='16']", "aria-pressed") == "true"
    assert page.evaluate(BACKGROUND) == BLACK


def test_keys_of_the_report_do_nothing(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/embed/latent/17")
    for key in ("r", "t", "/", "?", "[", "Escape"):
        page.keyboard.press(key)
    page.wait_for_timeout(100)
    assert page.url.endswith("#/embed/latent/17")
    assert page.locator("dialog").count() == 0


def test_what_leads_elsewhere_opens_the_report_in_a_tab(whole_report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(whole_report.folder)
    page = visited.open("#/s/large/embed/latent/17?theme=dark")
    page.wait_for_selector(".peers .rule code")
    page.wait_for_selector(".elsewhere dd a")
    links = page.eval_on_selector_all("#view a", "links => links.map(a => [a.target, a.rel])")
    assert len(links) > 10
    assert {tuple(link) for link in links} == {("_blank", "noopener")}
    for click, there in (
        (lambda: page.click(".whole"), "#/s/large/latent/17"),
        (lambda: page.click("[data-group=top] .t.peak >> nth=0"), "#/s/large/latents?q=token"),
    ):
        with visited.context.expect_page() as opened:
            click()
        tab = opened.value
        tab.wait_for_selector("header nav", state="visible")
        assert there in tab.url
        assert tab.evaluate("window.opener") is None
        tab.close()
    assert page.url.endswith("#/s/large/embed/latent/17?theme=dark")


@pytest.mark.parametrize("served", [False, True], ids=["file", "http"])
def test_a_frame_takes_no_focus_and_asks_for_nothing_outside(
    served: bool, whole_report: Any, tmp_path: Path, visit: Callable[..., Any], serve_folder: Callable[[Path], str]
) -> None:
    folder = Path(shutil.copytree(whole_report.folder, tmp_path / "report"))
    (folder / "host.html").write_text(HOST)
    visited = visit(folder, serve_folder(folder) if served else None)
    page = visited.page
    page.goto(f"{visited.base}/host.html")
    page.focus("#notes")
    frame = page.frame_locator("iframe")
    frame.locator("h1:text-is('Latent 17')").wait_for()
    frame.locator(".contexts .t.peak").first.wait_for()
    page.keyboard.type("one ")
    page.eval_on_selector("iframe", "frame => frame.src = 'index.html#/s/small/embed/latent/18?theme=dark'")
    frame.locator("h1:text-is('Latent 18')").wait_for()
    page.wait_for_timeout(100)
    page.keyboard.type("two")
    assert page.input_value("#notes") == "one two"
    assert page.evaluate("document.activeElement.id") == "notes"
    assert page.evaluate("scrollY") == 0
    assert all(url.startswith(f"{visited.base}/") for url in visited.requested)
    assert not [url for url in visited.requested if "api/" in url]


@pytest.mark.parametrize("address", ["#/embed/latent/99999", "#/embed/latents", "#/embed", "#/s/none/embed/latent/1"])
def test_what_is_not_there_is_said(address: str, whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open(address)
    assert page.text_content("#view h1") == "Not in this report"
    assert page.get_attribute("#view a", "target") == "_blank"
    assert not page.is_visible("header")
