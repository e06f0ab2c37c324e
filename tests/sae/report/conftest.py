"""Rendered reports to look at, and a browser to look with."""

import contextlib
import http.server
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from sae.report.config import ReportSpec
from sae.report.render import render_report
from sae.store.filesystem import Storage
from sae.store.records import Record


class Rendered(NamedTuple):
    """A committed report and where it lies."""

    storage: Storage
    spec: ReportSpec
    record: Record
    folder: Path


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module that makes artefacts up; it imports its neighbours as a script beside them would."""
    return import_beside("synthetic")


def import_beside(name: str) -> ModuleType:
    """A module of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def render(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """Make artefacts up and render them; keyword arguments go to `demo_spec`, or to `whole_spec` with `whole`."""

    def rendered(**options: Any) -> Rendered:
        storage = Storage(str(tmp_path_factory.mktemp("root")))
        whole = options.pop("whole", False)
        spec = (import_beside("synthetic_whole").whole_spec if whole else synthetic.demo_spec)(storage, **options)
        record = render_report(storage, spec, synthetic.LINEAGE)
        return Rendered(storage, spec, record, Path(storage.full(record.folder)))

    return rendered


@pytest.fixture(scope="session")
def report(render: Callable[..., Rendered]) -> Rendered:
    return render()


@pytest.fixture(scope="session")
def sweep_report(render: Callable[..., Rendered]) -> Rendered:
    """Two SAEs: one on text, one of eight latents on given activations."""
    return render(n_latents=70, sweep=True)


@pytest.fixture(scope="session")
def hostile_report(render: Callable[..., Rendered]) -> Rendered:
    """Tokens, labels, document names, SAE name and title that try to be markup."""
    return render(n_latents=120, hostile=True)


@pytest.fixture(scope="session")
def whole_report(render: Callable[..., Rendered]) -> Rendered:
    """A report with every view: two SAEs that can be compared, and one of given activations."""
    return render(whole=True)


@pytest.fixture(scope="session")
def serve_folder() -> Iterator[Callable[[Path], str]]:
    """Serve a folder as any static server does, on loopback; returns its address."""
    with contextlib.ExitStack() as servers:

        def served(folder: Path) -> str:
            def handler(*args: Any) -> StaticFiles:
                return StaticFiles(*args, directory=str(folder))

            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            servers.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield served


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


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Page]]:
    """Open pages; the test fails when one of them had a problem nobody read."""
    opened: list[Page] = []

    def page_of(folder: Path, base: str | None = None, **context: Any) -> Page:
        opened.append(Page(browser, folder, base, **context))
        return opened[-1]

    yield page_of
    for page in opened:
        page.context.close()
    assert [page.problems for page in opened] == [[] for _ in opened]
