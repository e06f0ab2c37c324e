"""The page for people who use a keyboard, a screen reader, large type or a narrow window."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.sae.report.axe import assert_accessible
from tests.sae.report.keyboard import Keyboard
from tests.sae.report.walk import Walk

pytestmark = pytest.mark.browser

VIEWS = {
    "": ".random li",
    "#/latents": ".rows .row .t",
    "#/latents?q=is:dead%20foo%3E1&page=1": ".parts .bad",
    "#/latents?q=is:dead%20id:17": ".empty",
    "#/latent/2": ".title-row:has(.pager .note) ~ [data-model]",
    "#/latent/3": ".banner",
    "#/map": ".map-near li",
    "#/compare": ".pair-list .rule",
    "#/try?p=1": ".reader .firing .rule",
    "#/judge": ".verdicts button",
    "#/s/toy/toy": ".heat td",
    "#/s/toy/latent/0": ".contexts .t",
    "#/latent/99999": "#view h1",
}
"""And what is there when a view is complete."""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(width: int, scheme: str, whole_report: Any, visit: Callable[..., Any]) -> None:
    size = {"width": width, "height": 900}
    page = visit(whole_report.folder, viewport=size, color_scheme=scheme, reduced_motion="reduce").open()
    assert_accessible(page, VIEWS)


def test_everything_is_reached_with_the_keyboard(whole_report: Any, visit: Callable[..., Any]) -> None:
    keys = Keyboard(visit(whole_report.folder).open())
    keys.skip_link()
    keys.list_and_latents()
    keys.map()
    keys.comparison()
    keys.passages()
    keys.help()


def test_keys_of_one_character_can_be_turned_off(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/latents")
    page.keyboard.press("?")
    page.uncheck("#letters")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    for key in ("t", "j", "?", "/"):
        page.keyboard.press(key)
    assert page.evaluate("document.documentElement.dataset.theme") is None
    assert page.locator("dialog").count() == 0
    page.click("#help")
    page.check("#letters")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_at_four_hundred_percent_everything_is_done_as_before(whole_report: Any, visit: Callable[..., Any]) -> None:
    """1,280 x 1,024 pixels at 400 %."""
    Walk(visit(whole_report.folder, viewport={"width": 320, "height": 256}, device_scale_factor=4).open()).go()


def test_the_list_tells_its_size_and_places_to_a_screen_reader(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/latents?sort=id")
    page.wait_for_selector(".rows .row .t")
    assert page.get_attribute("[role=grid]", "aria-rowcount") == "301"
    page.evaluate("document.querySelector('.grid').scrollTop = 4000")
    page.wait_for_selector(".rows [data-id='105']")
    assert page.get_attribute(".rows [data-id='105']", "aria-rowindex") == "107"
    assert page.locator(".rows [tabindex='0']").count() <= 1


def test_a_context_is_read_as_a_sentence(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open("#/latent/17")
    context = page.locator(".contexts .context").first
    said = str(context.locator(".hidden").text_content())
    assert said == f"fires on {context.locator('.t.peak').text_content()}, {page.text_content('.contexts .v')}: "
