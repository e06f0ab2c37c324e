"""The default run's own report in a browser: real text, a real model, from a disk and from a server."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.plan import PipelineConfig, make_plan
from sae.report.config import ReportSpec
from sae.report.render import render_report
from sae.store.artefacts.records import read_record, require_record
from sae.store.storage.filesystem import Storage
from tests.browsing import Page
from tests.flows.processes import strays
from tests.processes import wait_for
from tests.sae.report.axe import assert_accessible
from tests.sae.report.damage import SAID, assert_named
from tests.sae.report.keyboard import Keyboard
from tests.sae.report.latent_numbers import assert_numbers, latents_of
from tests.sae.report.test_killed import RENDER, contents
from tests.sae.report.walk import WIDER, Walk

pytestmark = [pytest.mark.slow, pytest.mark.browser]

PHONE = {"viewport": {"width": 390, "height": 844}}
DARK = {"color_scheme": "dark"}
WAYS = {"light": {}, "phone": PHONE | DARK, "forced": {"forced_colors": "active"}}

VIEWS = {
    "": ".random li",
    "#/latents": ".rows .row .t",
    "#/latents?q=is:dead%20foo%3E1": ".parts .bad",
    "#/latent/3": ".contexts .t.peak",
    "#/map": ".map-near li",
    "#/try?p=1": ".reader .firing .rule",
    "#/judge": ".verdicts button",
}
"""And what is there when a view is complete."""


@pytest.fixture(scope="module")
def spec(default_run: PipelineConfig) -> ReportSpec:
    return make_plan(default_run).report


@pytest.fixture(scope="module")
def folder(default_run: PipelineConfig, spec: ReportSpec) -> Path:
    storage = Storage(default_run.execution.root)
    return Path(storage.full(require_record(storage, spec.ref).folder))


@pytest.fixture(scope="module")
def name(folder: Path) -> str:
    """Of the one SAE, as the report has it."""
    (sae,) = (path.name for path in (folder / "data").iterdir() if path.is_dir())
    return sae


def go_through(page: Any) -> None:
    walk = Walk(page)
    walk.list_and_latents()
    walk.map()
    walk.passages_and_words()
    walk.judge()
    walk.back()


@pytest.mark.parametrize("way", WAYS)
def test_journey_from_a_disk(way: str, folder: Path, visit: Callable[..., Page]) -> None:
    go_through(visit(folder, **WAYS[way]).open())


def test_journey_from_a_server(folder: Path, serve_folder: Callable[[Path], str], visit: Callable[..., Page]) -> None:
    address = serve_folder(folder)
    visited = visit(folder, address, **DARK)
    go_through(visited.open())
    assert all(url.startswith(f"{address}/") for url in visited.requested)


def test_every_view_is_on_paper(folder: Path, visit: Callable[..., Page]) -> None:
    visited = visit(folder, viewport={"width": 718, "height": 1000})
    for address, there in VIEWS.items():
        page = visited.open(address)
        page.wait_for_selector(there, state="visible")
        page.emulate_media(media="print")
        assert not page.evaluate(WIDER), address
        assert not page.is_visible(".top")
        page.emulate_media(media="screen")
        page.goto("about:blank")


@pytest.mark.parametrize("way", ["light", "phone"])
def test_axe_finds_nothing_serious(way: str, folder: Path, visit: Callable[..., Page]) -> None:
    assert_accessible(visit(folder, reduced_motion="reduce", **WAYS[way]).open(), VIEWS)


def test_everything_is_reached_with_the_keyboard(folder: Path, visit: Callable[..., Page]) -> None:
    keys = Keyboard(visit(folder).open())
    keys.skip_link()
    keys.list_and_latents()
    keys.map()
    keys.passages()
    keys.help()


def test_a_search_finds_what_the_table_says(folder: Path, visit: Callable[..., Page]) -> None:
    table = pq.read_table(folder / "tables/latents.parquet", columns=["frequency", "max_act", "dead", "rule_precision"])
    frequency, maximum = table["frequency"].to_numpy(), table["max_act"].to_numpy()
    precision = table["rule_precision"].to_numpy()
    wanted = np.flatnonzero((frequency > 1e-3) & (maximum < 12) & (precision > 0.7))
    page = visit(folder).open("#/latents")
    found = page.evaluate("q => SAE.find(q)", "freq>1e-3 max<12 p>.7")
    assert sorted(found) == wanted.tolist()
    assert len(wanted) > 20


def test_numbers_of_fifty_random_latents_equal_the_table(folder: Path, visit: Callable[..., Page]) -> None:
    table = latents_of(folder)
    (n_rows,) = {round(row["n_fired"] / row["frequency"]) for row in table if row["n_fired"]}
    page = visit(folder).open("#/latent/0")
    for latent in np.random.default_rng(1).permutation(len(table))[:50].tolist():
        assert_numbers(page, folder, table[latent], n_rows)


@pytest.mark.parametrize("how", SAID)
def test_a_damaged_file_is_named_and_comes_back(
    how: str, folder: Path, name: str, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    views = {
        f"data/{name}/latents/0": ("#/latent/0", ".contexts .t"),
        f"data/{name}/map": ("#/map", ".map-near li"),
        f"data/{name}/try": ("#/try", ".reading .t"),
        f"data/{name}/try/0": ("#/try", ".reading .t"),
    }
    if how != "schema":
        views |= {
            f"data/{name}/col/order": ("#/latents", ".rows .row .t"),
            f"data/{name}/labels/0": ("#/latents?q=label:import", ".rows .row .t"),
            _shard(visit(folder), "self"): ("#/latents?q=self", ".rows .row .t"),
        }
    copied = Path(shutil.copytree(folder, tmp_path / "report"))
    assert_named(visit(copied), views, how, elsewhere=name)


def _shard(visited: Page, word: str) -> str:
    """The file of the index that holds a word."""
    page = visited.open(f"#/latents?q={word}")
    page.wait_for_selector(".rows .row .t")
    (url,) = {url for url in visited.requested if "/index/words/" in url}
    return url.removeprefix(f"{visited.base}/").removesuffix(".js")


def test_a_killed_render_is_done_again_to_the_same_bytes(
    default_run: PipelineConfig, spec: ReportSpec, tmp_path: Path
) -> None:
    """Under a key of its own, for another title."""
    storage, root = Storage(default_run.execution.root), Path(default_run.execution.root)
    again = spec.model_copy(update={"config": spec.config.model_copy(update={"title": "killed"})})
    file = tmp_path / "spec.json"
    file.write_text(again.model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", RENDER, storage.root, str(file)])
    wait_for(lambda: any(root.glob(".staging/**/data/*/latents/1.js")) or process.poll() is not None, 300)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert read_record(storage, again.ref) is None
    assert strays(storage.root) == []

    rendered = []
    for _ in range(2):
        folder = Path(storage.full(render_report(storage, again, []).folder))
        rendered.append(contents(folder))
        shutil.rmtree(folder.parent)
    assert rendered[0] == rendered[1]
    assert len(rendered[0]) > 100
