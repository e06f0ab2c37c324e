"""The page in a real browser, from file://."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.report import chunks
from sae.report.display import flat, show_tokens

pytestmark = pytest.mark.browser

COLUMNS = {
    "counts": np.array([0, 1, 2**32 - 1, 70_000], np.int64),
    "large": np.array([2**40, 1], np.int64),
    "flags": np.array([True, False, True]),
    "bytes": np.arange(32, dtype=np.uint8).reshape(2, 16),
    "floats": np.array([0.0, -1.5, np.nan, 3.14159, 1e-30, np.inf], np.float32),
    "all_unknown": np.full(1000, np.nan),
    **{
        f"{dtype}_{n}": (np.random.default_rng(n).lognormal(3, 2, n)).astype(dtype)
        for dtype in ("uint8", "uint32", "int64", "float32", "float64")
        for n in (0, 1, 100_000)
    },
}


def rows_shown(page: Any) -> list[int]:
    """Ids of the rows drawn, from the top."""
    return page.eval_on_selector_all(
        ".rows .row", "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(r => Number(r.dataset.id))"
    )


def wait_results(page: Any, count: str) -> None:
    page.wait_for_function("t => document.querySelector('#n-results')?.textContent === t", arg=count)


def test_columns_come_back_from_the_browsers_decoder(report: Any, tmp_path: Path, visit: Callable[..., Any]) -> None:
    folder = Path(shutil.copytree(report.folder, tmp_path / "report"))
    page = visit(folder).open()
    read = "key => SAE.loadColumn(key).then(v => Array.from(v, x => Number.isFinite(x) ? x : String(x)))"
    for name, values in COLUMNS.items():
        chunks.write_chunk(folder, f"data/test/{name}", chunks.encode_column(values))
        found = page.evaluate(read, f"data/test/{name}")
        expected = values if values.dtype.kind != "f" else chunks.round_mantissa(values.astype(np.float32))
        np.testing.assert_array_equal(np.array(found, np.float64), expected.reshape(-1).astype(np.float64), name)


def test_journey_through_the_views(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open()
    assert page.locator(".random li").count() == 12
    page.click("nav >> text=Latents")
    wait_results(page, "300")
    first = rows_shown(page)[0]
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:text-is('Latent {first}')")
    page.wait_for_selector(".pager [data-key=']']")
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.keyboard.press("]")
    page.wait_for_function("t => !document.querySelector('#view h1').textContent.endsWith(t)", arg=f" {first}")
    page.click(".peers a >> nth=0")
    page.go_back()
    page.go_back()
    page.wait_for_selector(f"h1:text-is('Latent {first}')")
    page.click("nav >> text=Toy")
    page.wait_for_selector("h1:text-is('Known answers')")
    page.click("nav >> text=Overview")
    page.wait_for_selector("#overview", state="visible")


def test_going_back_restores_the_place_in_the_list(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latents?sort=id")
    page.wait_for_selector(".rows .row")
    page.evaluate("document.querySelector('.grid').scrollTop = 4000")
    page.click(".rows [data-id='105'] a")
    page.wait_for_selector("h1:text-is('Latent 105')")
    page.go_back()
    page.wait_for_selector(".rows [data-id='105']")
    assert page.evaluate("document.querySelector('.grid').scrollTop") == 4000


def test_default_order_is_the_shuffle_of_the_overview(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open()
    random = page.eval_on_selector_all(".random .head a", "links => links.map(a => Number(a.textContent))")
    page.goto(f"{page.url}#/latents")
    wait_results(page, "300")
    assert rows_shown(page)[:12] == random


def test_sort_and_search_agree_with_the_table(report: Any, visit: Callable[..., Any]) -> None:
    table = pq.read_table(report.folder / "tables/latents.parquet").to_pylist()
    page = visit(report.folder).open("#/latents")
    page.click("[data-sort=max]")
    page.wait_for_selector("[aria-sort=descending] [data-sort=max]")
    assert "sort=-max" in page.url
    live = sorted((row for row in table if not row["dead"]), key=lambda row: -row["max_act"])
    assert rows_shown(page)[:10] == [row["latent"] for row in live[:10]]

    def search(text: str) -> int:
        wanted = page.evaluate("() => document.querySelector('#n-results').textContent")
        page.fill("#query", text)
        page.press("#query", "Enter")
        page.wait_for_function("q => new URLSearchParams(location.hash.split('?')[1]).get('q') === q", arg=text)
        page.wait_for_function("t => document.querySelector('#n-results').textContent !== t", arg=wanted)
        return int(page.text_content("#n-results").split()[0])

    assert search("is:dead") == sum(row["dead"] for row in table)
    assert search("freq>1.002e-3 max<20.1 -is:dense") == sum(
        row["frequency"] > 1.002e-3 and row["max_act"] < 20.1 and not row["dense"] for row in table
    )
    assert search("id:17") == 1
    assert search("is:dense | id:17") == 1 + sum(row["dense"] for row in table)
    labelled = [row for row in table if any(row[f"{d}_passes"] for d in ("top_tenth", "mass", "top_20"))]
    assert search("is:live | is:dead") == len(table)
    assert 0 < search("label:import") < len(labelled)


def test_a_bad_part_of_a_query_is_named_and_left_out(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latents?q=freqq%3E1%20id%3A17")
    wait_results(page, "1 of 300")
    assert page.text_content(".part .bad") == "freqq>1"
    assert "no number is called freqq" in page.text_content(".parts")


def test_no_matches_says_how_many_each_part_keeps(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latents?q=is:dead%20id:17")
    page.wait_for_selector(".empty")
    assert "keeps 1" in page.text_content(".parts")


def test_contexts_show_their_tokens_and_values(report: Any, visit: Callable[..., Any]) -> None:
    examples = pq.read_table(report.folder / "tables/examples.parquet").to_pylist()
    strongest = next(row for row in examples if row["latent"] == 17 and row["group"] == "top")
    page = visit(report.folder).open("#/latent/17")
    texts = page.eval_on_selector_all(
        ".contexts li:first-child >> nth=0 >> .t", "spans => spans.map(s => s.textContent)"
    )
    shown = show_tokens(strongest["token_bytes"])
    assert texts == ["".join(part if isinstance(part, str) else part[0] for part in token) for token in shown]
    peak = page.locator(".contexts li .t.peak").first
    assert "a6" in peak.get_attribute("class")
    assert f"token {strongest['token_ids'][strongest['peak']]}" in peak.get_attribute("title")


def test_dead_dense_and_rare_latents_say_what_they_are(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latent/3")
    assert "Never fired in 200,000 tokens" in page.text_content(".banner")
    assert page.locator(".histogram").count() == 0
    page = visit(report.folder).open("#/latent/5")
    assert page.text_content(".banner").startswith("Dense")
    assert page.locator(".groups h2").first.text_content().startswith("Random firings")
    page = visit(report.folder).open("#/latent/7")
    assert "Fired on 3 of 200,000 tokens" in page.text_content(".banner")


def test_an_address_that_is_not_there_offers_the_nearest(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latent/300")
    assert page.text_content("#view h1") == "Not in this report"
    assert page.get_attribute("#view a", "href") == "#/s/topk-24/latent/299"
    page = visit(report.folder).open("#/s/other/latents")
    assert page.text_content("#view h1") == "Not in this report"


@pytest.mark.parametrize("damage", ["missing", "truncated", "schema"])
def test_a_damaged_chunk_is_named_and_the_rest_works(
    damage: str, report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(report.folder, tmp_path / "report"))
    chunk = folder / "data/topk-24/latents/0.js"
    if damage == "missing":
        chunk.unlink()
    elif damage == "truncated":
        chunk.write_text(chunk.read_text()[:500] + '");')
    else:
        chunks.write_chunk(folder, "data/topk-24/latents/0", json.dumps({"schema": 0}).encode())
    visited = visit(folder)
    page = visited.open("#/latent/0")
    assert "data/topk-24/latents/0.js" in page.text_content("[role=alert]")
    page.evaluate("location.hash = '#/latents'")
    wait_results(page, "300")
    if damage == "missing":
        assert visited.problems
        assert all("ERR_FILE_NOT_FOUND" in problem for problem in visited.problems)
        visited.problems.clear()


def test_hostile_text_stays_text(hostile_report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(hostile_report.folder)
    addresses = [
        "",
        "#/latents",
        "#/latents?q=%3Cscript%3E",
        "#/latents?q=token:%22%3Cscript%3Ealert(1)%3C/script%3E%22",
    ]
    addresses += ["#/latents?q=doc:%3Cimg&page=1", "#/latent/17", "#/judge", "#/toy", "#/<img src=x>", "#/?draw=1"]
    for address in addresses:
        page = visited.open(address) if "draw" not in address else visited.open("")
        if "draw" in address:
            page.click("text=another 12")
        page.wait_for_timeout(150)
        assert page.evaluate("window.PWN") is None
        assert page.locator("img, iframe, object, embed").count() == 0
        assert page.evaluate("document.querySelectorAll('script').length") == 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
        text = page.evaluate("document.body.innerText + document.title")
        assert "\u202e" not in text
        assert "\x00" not in text
        page.goto("about:blank")


def test_a_hostile_token_can_be_looked_up(hostile_report: Any, visit: Callable[..., Any]) -> None:
    table = pq.read_table(hostile_report.folder / "tables/latents.parquet").to_pylist()
    page = visit(hostile_report.folder).open("#/latents")
    for raw in {row["rule_bytes"] for row in table if row["rule_kind"] == "token"}:
        name = flat(show_tokens([raw])[0])
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        wanted = {row["latent"] for row in table if row["rule_kind"] == "token" and row["rule_bytes"] == raw}
        assert wanted <= set(page.evaluate("q => SAE.find(q)", f'token:"{quoted}"')), name


def test_hostile_tokens_are_all_shown(hostile_report: Any, synthetic: Any, visit: Callable[..., Any]) -> None:
    examples = pq.read_table(hostile_report.folder / "tables/examples.parquet").to_pylist()
    page = visit(hostile_report.folder).open("#/latent/0")
    wanted = {token for token in synthetic.HOSTILE if token.isascii() and len(token) < 80 and b"\x00" not in token}
    for row in examples:
        here = wanted & set(row["token_bytes"])
        if not here:
            continue
        page.evaluate("id => location.hash = `#/latent/${id}`", row["latent"])
        page.wait_for_selector(f"h1:text-is('Latent {row['latent']}')")
        shown = set(page.eval_on_selector_all(".contexts .t", "spans => spans.map(s => s.textContent)"))
        assert {token.decode() for token in here} <= shown
        wanted -= here
        if not wanted:
            break
    assert not wanted


def test_the_toy_page_tells_unions_from_latents(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/toy")
    text = page.inner_text("#view")
    assert "the union of latents 1 + 2" in text
    assert page.locator(".pass").count() == 3
    assert page.locator(".fail").count() == 1
    assert page.locator(".heat tbody tr").count() == 8
    assert "20 of 20 features found at cosine > .95" in text
    assert "the article's own initialisation and loss" in text


def test_given_activations_show_row_names(sweep_report: Any, visit: Callable[..., Any]) -> None:
    page = visit(sweep_report.folder).open("#/s/toy/latent/0")
    assert page.locator(".contexts .t").first.text_content() == "cat"
    assert "given without text" in page.text_content(".label-row")
    page.select_option("#sae-switch", "topk-24")
    wait_results(page, "70")


def test_overview_is_complete_without_script(report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(report.folder, java_script_enabled=False)
    visited.page.goto(f"file://{report.folder}/index.html")
    text = visited.page.inner_text("body")
    assert ".195" in text
    assert "12 random live latents" in text
    assert visited.page.locator("svg.plot").count() >= 5
    assert "tables/" in visited.page.inner_text("noscript")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_pages_do_not_scroll_sideways(scheme: str, report: Any, visit: Callable[..., Any]) -> None:
    visited = visit(report.folder, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for address in ("#/latents", "#/latent/17", "#/toy", ""):
        assert visited.open(address).evaluate("document.documentElement.scrollWidth <= 390"), address
        visited.page.goto("about:blank")


def test_theme_switch_is_remembered(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder, color_scheme="light").open()
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.keyboard.press("t")
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_forced_colours_keep_the_underline(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder, forced_colors="active").open("#/latent/17")
    width = page.evaluate("getComputedStyle(document.querySelector('.t.a6')).borderBottomWidth")
    assert width == "4px"


def test_another_dozen_random_latents_follow_in_the_shuffled_order(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open()
    drawn = "() => [...document.querySelectorAll('.random .head a')].map(a => Number(a.textContent))"
    first = page.evaluate(drawn)
    page.click("text=another 12")
    page.wait_for_function("id => document.querySelector('.random .head a').textContent !== String(id)", arg=first[0])
    second = page.evaluate(drawn)
    assert "draw=1" in page.url
    page.goto(f"{page.url.split('#')[0]}#/latents")
    wait_results(page, "300")
    assert rows_shown(page)[:18] == [*first, *second][:18]
    page.go_back()
    page.wait_for_selector("#overview", state="visible")
    assert page.evaluate(drawn) == second
