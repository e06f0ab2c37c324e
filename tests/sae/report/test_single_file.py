"""A few latents as one file: complete, safe, and asking for nothing."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from sae.errors import ConfigError, StoreError
from sae.report import single_file as module
from sae.report.finished import open_finished
from sae.report.single_file import DEFAULT_LATENTS, MAX_LATENTS, single_file
from tests.browsing import Page
from tests.sae.report.latent_numbers import assert_numbers, latents_of

CHOSEN = [3, 5, 7, 11, 17, 40, 222]
"""A dead, a dense and a rare latent, a near duplicate, others; 12, the twin, is not among them."""


def written(report: Any, folder: Path, latents: list[int] | None = None, **options: Any) -> Path:
    """The file, alone in a folder, under the name that the tests' page opens."""
    folder.mkdir()
    text = single_file(open_finished(report.storage.uri(report.record.ref)), latents, **options)
    (folder / "index.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chosen(whole_report: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(whole_report, tmp_path_factory.mktemp("one") / "file", CHOSEN)


@pytest.fixture
def alone(visit: Callable[..., Page]) -> Iterator[Callable[..., Page]]:
    """Visit a folder; all that was ever asked for is the file."""
    visited: list[Page] = []

    def page_of(*arguments: Any, **options: Any) -> Page:
        visited.append(visit(*arguments, **options))
        return visited[-1]

    yield page_of
    for one in visited:
        asked = {url.partition("#")[0] for url in one.requested} - {"about:blank"}
        assert asked <= {f"{one.base}/index.html"}


def rows_shown(page: Any) -> list[int]:
    page.wait_for_selector(".rows .row .t")
    return sorted(page.eval_on_selector_all(".rows .row", "rows => rows.map(row => Number(row.dataset.id))"))


@pytest.mark.browser
def test_every_chosen_latent_has_its_numbers_and_contexts(
    report: Any, tmp_path: Path, alone: Callable[..., Page]
) -> None:
    table = latents_of(report.folder)
    page = alone(written(report, tmp_path / "file", CHOSEN)).open("#/latent/40")
    for latent in CHOSEN:
        assert_numbers(page, report.folder, table[latent], 200_000)


@pytest.mark.browser
@pytest.mark.slow
def test_contexts_are_those_of_the_report(chosen: Path, whole_report: Any, alone: Callable[..., Page]) -> None:
    read = """() => [...document.querySelectorAll('.contexts li')].map(li => [li.innerText,
      ...[...li.querySelectorAll('.t')].map(t => [t.className, t.title])])"""
    for latent in CHOSEN[1:]:
        address = f"#/s/large/latent/{latent}"
        whole = alone_page(alone, whole_report.folder, address).evaluate(read)
        assert alone(chosen).open(address).evaluate(read) == whole
        assert len(whole) >= 3


def alone_page(alone: Callable[..., Page], folder: Path, address: str) -> Any:
    """A page of the whole report, which may ask for its files."""
    visited = alone(folder)
    page = visited.open(address)
    page.wait_for_selector(".contexts .t")
    visited.requested.clear()
    return page


@pytest.mark.browser
def test_the_list_sorts_searches_and_exports_what_is_there(
    chosen: Path, whole_report: Any, alone: Callable[..., Page]
) -> None:
    table = {row["latent"]: row for row in latents_of(whole_report.folder) if row["sae"] == "large"}
    page = alone(chosen).open("#/latents")
    assert rows_shown(page) == CHOSEN
    assert page.text_content("#n-results") == f"{len(CHOSEN)} of 300"
    assert page.text_content("#holds") == f"This file holds {len(CHOSEN)} of the 300 latents of large."
    page.click("[data-sort=max]")
    page.wait_for_selector("[aria-sort=descending] [data-sort=max]")
    tops = "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(row => Number(row.dataset.id))"
    by_max = sorted(CHOSEN[1:], key=lambda latent: -table[latent]["max_act"])
    assert page.eval_on_selector_all(".rows .row", tops) == [*by_max, 3]
    found = lambda query: page.evaluate("q => SAE.find(q)", query)
    assert sorted(found("is:dead")) == [3]
    assert sorted(found("-is:dead")) == CHOSEN[1:]
    assert found("id:17 | id:18") == [17]
    assert found("near:18") == [] or set(found("near:18")) <= set(CHOSEN)
    rule = table[17]["rule_name"]
    assert 17 in found(f'label:"{rule}"')
    with page.expect_download() as download:
        page.click("text=JSON")
    rows = json.loads(Path(download.value.path()).read_text())
    assert sorted(row["latent"] for row in rows) == CHOSEN


@pytest.mark.browser
def test_what_is_not_in_the_file_is_said(chosen: Path, alone: Callable[..., Page]) -> None:
    page = alone(chosen).open("#/latent/12")
    assert page.text_content("#view h1") == "Latent 12 is not in this file"
    assert "This file holds 7 of the 300 latents of large; this one is in the whole report" in page.inner_text("#view")
    page.click("text=The latents of this file")
    assert rows_shown(page) == CHOSEN
    for address in ("#/map", "#/compare", "#/try", "#/judge", "#/toy", "#/latent/300"):
        page.evaluate("hash => location.hash = hash", address)
        page.wait_for_selector("h1:text-is('Not in this report')")
    page.evaluate("location.hash = '#/latents?q=near:12%20split:17%20doc:lib'")
    page.wait_for_selector(".parts .bad")
    said = page.inner_text(".parts")
    assert "latent 12 is not in this file" in said
    assert "this file has no splits" in said
    assert "this file has no index of all words" in said
    assert "judge" not in page.inner_text(".list-tools")


@pytest.mark.browser
def test_neighbours_keep_their_labels_and_lead_to_a_word(chosen: Path, alone: Callable[..., Page]) -> None:
    page = alone(chosen).open("#/latent/11")
    page.wait_for_selector(".peers .rule code")
    assert page.locator(".peers .rule:empty").count() == 0
    page.click(".banner a")
    page.wait_for_selector("h1:text-is('Latent 12 is not in this file')")


@pytest.mark.browser
@pytest.mark.parametrize("served", [False, True], ids=["file", "http"])
def test_the_overview_is_there_and_names_what_was_left_out(
    served: bool, chosen: Path, alone: Callable[..., Page], serve_folder: Callable[[Path], str]
) -> None:
    page = alone(chosen, serve_folder(chosen) if served else None).open()
    said = page.inner_text("#one-file")
    assert "this overview and 7 of the 300 latents of large; 0 of the 120 latents of small" in said
    assert page.locator("svg.plot").count() >= 8
    assert page.inner_text("header nav").split() == ["Overview", "Latents"]
    assert page.locator("text=another 12").count() == 0
    assert page.locator("a[download], a[href^=tables], a[href^=manifest], a[href$='/toy/toy']").count() == 0
    page.hover("[data-plot] >> nth=0")
    page.select_option("#sae-switch", "small")
    page.click("nav >> text=Latents")
    page.wait_for_selector("#holds")
    assert "This file holds 0 of the 120 latents of small." in page.inner_text("#view")
    assert page.inner_text(".empty") == "None is here."


@pytest.mark.browser
def test_its_policy_lets_no_other_script_run(chosen: Path, alone: Callable[..., Page]) -> None:
    visited = alone(chosen)
    page = visited.open("#/latents")
    page.evaluate("""() => {
      const script = document.createElement('script');
      script.textContent = 'window.PWN = 1';
      document.body.append(script);
      const image = new Image();
      image.src = 'https://example.org/x.png';
      document.body.append(image);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.PWN") is None
    assert len(visited.problems) >= 2
    assert all("Content Security Policy" in problem for problem in visited.problems)
    visited.problems.clear()


@pytest.mark.slow
@pytest.mark.browser
def test_hostile_text_stays_text(render: Callable[..., Any], tmp_path: Path, alone: Callable[..., Page]) -> None:
    report = render(whole=True, n_latents=120, n_other=70, hostile=True)
    folder = written(report, tmp_path / "file")
    text = (folder / "index.html").read_text()
    assert len(re.findall(r"<script\b", text, re.IGNORECASE)) == len(re.findall(r"</script", text, re.IGNORECASE)) == 3
    assert "<img" not in text
    key = open_finished(str(report.folder)).summary["saes"][0]["key"]
    here = module._chosen(open_finished(str(report.folder)), None, None)[key]
    for address in ("", "#/latents", "#/latents?q=%3C/script%3E", *(f"#/latent/{latent}" for latent in here[:8])):
        page = alone(folder, viewport={"width": 390, "height": 800}).open(address)
        page.wait_for_timeout(100)
        assert page.evaluate("window.PWN") is None
        assert page.locator("img, iframe, object, embed").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address


def test_by_default_it_holds_the_first_of_the_random_order(report: Any, tmp_path: Path) -> None:
    finished = open_finished(report.storage.uri(report.record.ref))
    text = single_file(finished)
    summary = json.loads(re.findall(r'id="summary">(.*?)</script>', text)[0])
    order = finished.column(finished.sae(None), "order")[:DEFAULT_LATENTS].tolist()
    assert summary["saes"][0]["only"] == sorted(order)
    random = re.findall(r'class="head"><a href="[^"]*">(\d+)</a>', text)
    assert {int(latent) for latent in random} <= set(order)
    assert single_file(finished) == text
    assert len(text) < 1_000_000
    assert not re.search(r'(?:src|href)="(?!#|data:)', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))


def test_many_latents_are_a_few_megabytes(whole_report: Any) -> None:
    finished = open_finished(whole_report.storage.uri(whole_report.record.ref))
    assert len(single_file(finished, range(MAX_LATENTS))) < 3_000_000


def test_the_command_writes_it_from_a_root_a_record_and_a_copy(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(report.folder, tmp_path / "copy")
    files = []
    for number, uri in enumerate((report.storage.root, f"{report.folder}/index.html", str(copy))):
        files.append(tmp_path / f"{number}.html")
        assert main(["page", uri, str(files[-1]), "--latents", "17, 5", "--sae", "topk-24"]) == 0
    assert len({file.read_bytes() for file in files}) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{files[0]}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--latents", "1;2"], "numbers with commas"),
        (["--latents", "300"], "latents 0 to 299"),
        (["--latents", ",".join(map(str, range(201)))], "201 latents"),
        (["--sae", "other"], "the report has topk-24"),
    ],
)
def test_wrong_requests_are_the_users(
    arguments: list[str], said: str, report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.html"
    assert main(["page", str(report.folder), str(out), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert main(["page", str(report.folder), str(tmp_path / "no" / "out.html")]) == 2
    assert main(["page", str(tmp_path), str(out)]) == 2


def test_damaged_and_earlier_reports_are_named(report: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(report.folder, tmp_path / "report"))
    script = next((folder / "assets").glob("app.*.js"))
    script.write_text(script.read_text().replace("#inlined", "#other"))
    with pytest.raises(StoreError, match="of another version"):
        single_file(open_finished(str(folder)), [17])
    chunk = folder / "data/topk-24/col/max.js"
    chunk.write_text(chunk.read_text()[:-30])
    with pytest.raises(StoreError, match=r"col/max\.js: damaged"):
        single_file(open_finished(str(folder)), [17])
    with pytest.raises(ConfigError, match="0 latents"):
        single_file(open_finished(str(report.folder)), [])


def test_labels_of_a_model_are_kept(whole_report: Any) -> None:
    finished = open_finished(whole_report.storage.uri(whole_report.record.ref))
    rows = pq.read_table(whole_report.folder / "tables/latents.parquet").to_pylist()
    labelled = [r["latent"] for r in rows if r["sae"] == "large" and r["model_explanation"] is not None][:3]
    text = single_file(finished, labelled)
    data = json.loads(re.findall(r'id="inlined">(.*?)</script>', text)[0])
    key = "data/large/labels/0"
    shard = json.loads(module.chunks.decode_chunk(key, f'SAE.put("{key}","{data[key]}");\n'.encode()))
    assert [shard[latent][4] for latent in labelled] == [["calls and their names"]] * 3
