"""A walk through a report by somebody who only types."""

import json
from typing import Any

from tests.sae.report.walk import Walk


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

    def skip_link(self) -> None:
        page = self.page
        self.press("Tab")
        assert "Skip to content" in self.focused()
        self.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"

    def list_and_latents(self) -> None:
        page = self.page
        self.press("/")
        page.keyboard.type("t self")  # t is text here, not the theme
        assert page.evaluate("document.documentElement.dataset.theme") is None
        for _ in range(6):
            self.press("Backspace")
        page.keyboard.type("self")
        self.press("Enter")
        self.heading("Latents")
        walked = []
        for key in ("j", "ArrowDown", "j", "k", "ArrowUp", "j"):
            self.press(key)
            walked.append(page.evaluate("Number(document.activeElement.dataset.id)"))
        ids = Walk(page).rows()
        assert walked == [ids[i] for i in (0, 1, 2, 1, 0, 1)]
        self.press("Enter")
        self.heading(f"Latent {ids[1]}")
        page.wait_for_selector(".pager [data-key=']']")
        self.press("]")
        self.heading(f"Latent {ids[2]}")
        self.tab_to(".contexts .context")
        before = page.text_content(".readout")
        self.press("ArrowLeft")
        assert page.text_content(".readout") != before
        self.press("Escape")
        self.heading("Latents")
        self.tab_to("[data-sort=max]")
        self.press("Enter")
        self.arrived("[aria-sort=descending] [data-sort=max]:focus")

    def map(self) -> None:
        page = self.page
        page.focus(".brand")
        self.tab_to("[data-view=map]")
        self.press("Enter")
        self.heading("Map")
        page.wait_for_selector(".map-near li")
        self.tab_to("canvas.map")
        status = page.text_content(".list-head .note")
        for key in ("+", "+", "+", "+", "ArrowRight", "ArrowUp"):
            self.press(key)
        page.wait_for_function("t => document.querySelector('.list-head .note').textContent !== t", arg=status)
        self.tab_to(".map-near a")
        self.press("Enter")
        self.arrived("h1:has-text('Latent ')")

    def comparison(self) -> None:
        page = self.page
        page.focus(".brand")
        self.tab_to("[data-view=compare]")
        self.press("Enter")
        self.heading("Compare")
        self.tab_to(".pair-list button")
        self.press("Enter")
        self.arrived(".beside .contexts")
        assert 'aria-expanded="true"' in self.focused()

    def passages(self) -> None:
        page = self.page
        page.focus(".brand")
        self.tab_to("[data-view=try]")
        self.press("Enter")
        self.heading("Try it")
        self.tab_to(".reading")
        self.press("ArrowRight")
        self.press("Enter")
        assert page.locator(".t.pinned").count() == 1
        self.tab_to(".on-token [data-latent]")
        self.press("Enter")
        self.arrived(".reading [class*=' a']")

    def help(self) -> None:
        page = self.page
        self.press("?")
        self.arrived("dialog[open]")
        self.press("Escape")
        page.wait_for_selector("dialog", state="detached")
        assert page.evaluate("document.activeElement !== document.body")
