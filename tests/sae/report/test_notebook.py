import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sae.errors import ConfigError, StoreError
from sae.report.notebook import open_report
from sae.report.numbers import decimal, short


class Elements(HTMLParser):
    """Tags and attribute names of a piece of HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_latent_shows_its_numbers_and_the_tokens_of_its_contexts(report: Any) -> None:
    opened = open_report(report.storage.uri(report.record.ref))
    html = opened.latent(17, n_contexts=2)
    row = pq.read_table(report.folder / "tables/latents.parquet").slice(17, 1).to_pylist()[0]
    examples = pq.read_table(report.folder / "tables/examples.parquet").to_pylist()
    mine = [example for example in examples if example["latent"] == 17 and example["rank"] < 2]
    text = "".join(Elements(html).text)
    assert f"{row['n_fired']:,} of 200,000" in text
    assert f"max {decimal(short(row['max_act']))}" in text
    assert f"P {decimal(row['rule_precision'], 2)} R {decimal(row['rule_recall'], 2)}" in text
    for example in mine:
        peak = example["token_bytes"][example["peak"]].decode(errors="ignore").strip()
        assert peak in text
    assert html.count("font:13px/22px monospace") == len(mine)
    assert html._repr_html_() == html


def test_dead_latents_and_given_activations_are_shown_too(sweep_report: Any) -> None:
    opened = open_report(f"{sweep_report.storage.uri(sweep_report.record.ref)}/index.html")
    assert "Never fired in 200,000 rows (95 % upper bound 1.5e-05)" in opened.latent(3)
    assert ">cat</span>" in opened.latent(0, sae="toy")
    overview = Elements(opened._repr_html_())
    assert {"topk-24", "toy", "70", "8"} <= set(overview.text)


def test_hostile_text_is_only_text_and_there_is_no_script(hostile_report: Any) -> None:
    opened = open_report(hostile_report.storage.uri(hostile_report.record.ref))
    pieces = [opened._repr_html_(), *(opened.latent(number, n_contexts=20) for number in range(40))]
    for html in pieces:
        found = Elements(html)
        assert found.tags <= {"div", "p", "b", "code", "span", "table", "thead", "tbody", "tr", "th", "td"}
        assert found.attributes <= {"style", "title"}
        assert not re.search("[\u202e\x00\u2028]", html)
    assert any("<script>alert(1)</script>" in "".join(Elements(html).text) for html in pieces)


def test_a_copy_of_the_folder_opens(report: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(report.folder, tmp_path / "copy")
    assert open_report(str(copy)).latent(17) == open_report(report.storage.uri(report.record.ref)).latent(17)


def test_what_is_not_there_is_named(report: Any, tmp_path: Path) -> None:
    opened = open_report(report.storage.uri(report.record.ref))
    with pytest.raises(ConfigError, match="latents 0 to 299"):
        opened.latent(300)
    with pytest.raises(ConfigError, match="the report has topk-24"):
        opened.latent(0, sae="other")
    with pytest.raises(StoreError):
        open_report(str(tmp_path))
    with pytest.raises(StoreError, match="record"):
        open_report(f"{tmp_path}/reports/0123456789abcdef")


def address_in(html: str) -> str:
    found = re.search(r'<iframe src="(http://127\.0\.0\.1:\d+/index\.html[^"]*)"', html)
    assert found
    return found[1]


@pytest.mark.browser
def test_a_frame_shows_the_latent_and_the_report(report: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    opened = open_report(report.storage.uri(report.record.ref))
    shown = opened.show(17, height=333)
    assert 'height="333"' in shown
    assert shown._repr_html_() == shown
    address = address_in(shown)
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8>{shown}{opened.show()}")
    visited = visit(tmp_path, address.partition("/index.html")[0])
    visited.problems.clear()
    visited.base = ""  # the notebook is a file, its frames are served
    visited.context.unroute_all()
    page = visited.page
    page.goto(f"file://{tmp_path}/notebook.html")
    frame = page.frame_locator("iframe >> nth=0")
    frame.locator("h1:text-is('Latent 17')").wait_for()
    frame.locator(".contexts .t.peak").first.wait_for()
    assert not frame.locator("header").is_visible()
    whole = page.frame_locator("iframe >> nth=1")
    whole.locator("nav >> text=Latents").click()
    whole.locator(".rows .row .t").first.wait_for()


def test_one_server_answers_for_a_folder_and_only_for_its_files(sweep_report: Any, tmp_path: Path) -> None:
    opened = open_report(sweep_report.storage.uri(sweep_report.record.ref))
    address = address_in(opened.show(0, sae="toy"))
    assert address.endswith("#/s/toy/embed/latent/0")
    base = address.partition("/index.html")[0]
    assert address_in(open_report(f"{sweep_report.folder}/index.html").show()).startswith(f"{base}/")
    copy = shutil.copytree(sweep_report.folder, tmp_path / "copy")
    assert not address_in(open_report(str(copy)).show()).startswith(f"{base}/")
    for name, kind in (("", "text/html"), ("manifest.json", "application/json"), ("tables/README.md", "text/markdown")):
        with urllib.request.urlopen(f"{base}/{name}") as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            assert answer.read() == (sweep_report.folder / (name or "index.html")).read_bytes()
    for path in ("/../record.json", "/%2e%2e/record.json", "/record.json", "/data", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}{path}")
    elsewhere = urllib.request.Request(f"{base}/index.html", headers={"Host": "report.example.org"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(elsewhere)


def test_a_file_that_went_missing_is_an_error_of_the_server(report: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(report.folder, tmp_path / "copy"))
    base = address_in(open_report(str(copy)).show()).partition("/index.html")[0]
    (copy / "data/topk-24/latents/0.js").unlink()
    with pytest.raises(urllib.error.HTTPError, match="500"):
        urllib.request.urlopen(f"{base}/data/topk-24/latents/0.js")


def test_a_frame_of_what_is_not_there_is_refused(report: Any) -> None:
    opened = open_report(report.storage.uri(report.record.ref))
    with pytest.raises(ConfigError, match="latents 0 to 299"):
        opened.show(300)
    with pytest.raises(ConfigError, match="the report has topk-24"):
        opened.show(sae="other")
