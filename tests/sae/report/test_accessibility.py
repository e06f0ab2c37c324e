"""The page for people who use a keyboard, a screen reader, large type or a narrow window."""

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest

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


MORE_OF_THE_SAME = [".contexts li:nth-child(n + 4)", ".pair-list tbody tr:nth-child(n + 9)", ".row:nth-child(n + 9)"]
"""Left out: axe takes seconds for a thousand tokens."""


def found_by_axe(page: Any) -> list[str]:
    """What axe calls serious or critical: rule, place, and what is wrong."""
    # Without preload: it would fetch the stylesheet, which file:// forbids.
    options = {"resultTypes": ["violations"], "preload": False, "rules": {"target-size": {"enabled": True}}}
    found = page.evaluate("([of, options]) => axe.run(of, options)", [{"exclude": MORE_OF_THE_SAME}, options])
    return [
        f"{one['id']} {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(width: int, scheme: str, whole_report: Any, visit: Callable[..., Any]) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe is not installed")
    axe = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    size = {"width": width, "height": 900}
    page = visit(whole_report.folder, viewport=size, color_scheme=scheme, reduced_motion="reduce").open()
    page.evaluate(axe)
    problems = {}
    for address, there in VIEWS.items():
        page.evaluate("hash => location.hash = hash", address)
        page.wait_for_selector(there, state="visible")
        problems[address] = found_by_axe(page)
    page.keyboard.press("?")
    problems["help"] = found_by_axe(page)
    assert {where: found for where, found in problems.items() if found} == {}, json.dumps(problems, indent=1)


class Keyboard:
    """A page that is only ever typed at."""

    def __init__(self, page: Any) -> None:
        self.page, self.press = page, page.keyboard.press

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))

    def tab_to(self, selector: str) -> None:
        for _ in range(150):
            self.press("Tab")
            if self.page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    def arrived(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="visible")
        assert self.page.evaluate("document.activeElement !== document.body"), self.page.url

    def heading(self, text: str) -> None:
        """A new view: its heading has the focus, its name is the title and was announced."""
        self.arrived(f"#view h1:text-is({json.dumps(text)})")
        self.page.wait_for_function("t => document.activeElement.textContent === t", arg=text)
        assert self.page.title().startswith(f"{text} · ")
        assert self.page.text_content("#announce") == text


def test_everything_is_reached_with_the_keyboard(whole_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(whole_report.folder).open()
    keys = Keyboard(page)
    keys.press("Tab")
    assert "Skip to content" in keys.focused()
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    keys.press("/")
    page.keyboard.type("t self")  # t is text here, not the theme
    assert page.evaluate("document.documentElement.dataset.theme") is None
    for _ in range(6):
        keys.press("Backspace")
    page.keyboard.type("self")
    keys.press("Enter")
    keys.heading("Latents")
    walked = []
    for key in ("j", "ArrowDown", "j", "k", "ArrowUp", "j"):
        keys.press(key)
        walked.append(page.evaluate("Number(document.activeElement.dataset.id)"))
    ids = Walk(page).rows()
    assert walked == [ids[i] for i in (0, 1, 2, 1, 0, 1)]
    keys.press("Enter")
    keys.heading(f"Latent {ids[1]}")
    page.wait_for_selector(".pager [data-key=']']")
    keys.press("]")
    keys.heading(f"Latent {ids[2]}")
    keys.tab_to(".contexts .context")
    before = page.text_content(".readout")
    keys.press("ArrowLeft")
    assert page.text_content(".readout") != before
    keys.press("Escape")
    keys.heading("Latents")
    keys.tab_to("[data-sort=max]")
    keys.press("Enter")
    keys.arrived("[aria-sort=descending] [data-sort=max]:focus")

    page.focus(".brand")
    keys.tab_to("[data-view=map]")
    keys.press("Enter")
    keys.heading("Map")
    page.wait_for_selector(".map-near li")
    keys.tab_to("canvas.map")
    status = page.text_content(".list-head .note")
    for key in ("+", "+", "+", "+", "ArrowRight", "ArrowUp"):
        keys.press(key)
    page.wait_for_function("t => document.querySelector('.list-head .note').textContent !== t", arg=status)
    keys.tab_to(".map-near a")
    keys.press("Enter")
    keys.arrived("h1:has-text('Latent ')")

    page.focus(".brand")
    keys.tab_to("[data-view=compare]")
    keys.press("Enter")
    keys.heading("Compare")
    keys.tab_to(".pair-list button")
    keys.press("Enter")
    keys.arrived(".beside .contexts")
    assert 'aria-expanded="true"' in keys.focused()

    page.focus(".brand")
    keys.tab_to("[data-view=try]")
    keys.press("Enter")
    keys.heading("Try it")
    keys.tab_to(".reading")
    keys.press("ArrowRight")
    keys.press("Enter")
    assert page.locator(".t.pinned").count() == 1
    keys.tab_to(".on-token [data-latent]")
    keys.press("Enter")
    keys.arrived(".reading [class*=' a']")

    keys.press("?")
    keys.arrived("dialog[open]")
    keys.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert page.evaluate("document.activeElement !== document.body")


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
