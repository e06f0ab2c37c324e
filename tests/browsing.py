"""Pages of a report, opened from a disk or a server, and everything that should never happen on them."""

import http.server
from pathlib import Path
from typing import Any


class StaticFiles(http.server.SimpleHTTPRequestHandler):
    """Files, without a line per request."""

    def log_message(self, *_: Any) -> None:
        pass


class Page:
    """A page of a report, with everything that should never happen noted in `problems`.

    Requests outside the report, of whatever kind, are stopped. `base`: where the folder is served; None: file://.
    """

    def __init__(self, browser: Any, folder: Path, base: str | None = None, **context: Any) -> None:
        self.folder = folder
        self.base = base or f"file://{folder}"
        self.problems: list[str] = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.problems.append(f"console {m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        self.requested: list[str] = []
        self.context.route("**/*", self._answer)

    def _answer(self, route: Any) -> None:
        url = route.request.url
        self.requested.append(url)
        if url.startswith(f"{self.base}/"):
            return route.continue_()
        self.problems.append(f"request outside the folder: {url}")
        return route.abort()

    def open(self, address: str = "") -> Any:
        """Open an address of the report and wait until its view is drawn."""
        self.page.goto(f"{self.base}/index.html{address}")
        self.page.wait_for_selector(
            "#view h1, #overview:not([hidden]) h1" if not address else "#view h1", state="visible"
        )
        return self.page
