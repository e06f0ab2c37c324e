"""The list and its queries in a real browser, against the tables beside the page."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.report.display import flat, show_tokens
from sae.report.words import words_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def table(report: Any) -> list[dict[str, Any]]:
    return pq.read_table(report.folder / "tables/latents.parquet").to_pylist()


@pytest.fixture(scope="module")
def contexts(report: Any) -> list[dict[str, Any]]:
    """The strongest contexts of all latents."""
    rows = pq.read_table(report.folder / "tables/examples.parquet").to_pylist()
    return [row for row in rows if row["group"] == "top"]


def found_by(page: Any, query: str) -> set[int]:
    """The latents that a query finds, read from the export of the script itself."""
    page.evaluate("q => location.hash = `#/latents?q=${encodeURIComponent(q)}`", query)
    page.wait_for_function(
        "q => new URLSearchParams(location.hash.split('?')[1]).get('q') === q && document.querySelector('#n-results')",
        arg=query,
    )
    return set(page.evaluate("q => SAE.find(q)", query))


def shown(token: bytes) -> str:
    return flat(show_tokens([token])[0])


def test_queries_find_what_the_tables_say(
    report: Any, table: list[dict[str, Any]], contexts: list[dict[str, Any]], visit: Callable[..., Any]
) -> None:
    page = visit(report.folder).open("#/latents")
    prefers = [
        (row["latent"], shown(token))
        for row in table
        for token, p, lift in zip(row["token_bytes"], row["token_precision"], row["token_lift"], strict=True)
        if p >= 0.1 and lift >= 2
    ]
    live = [row for row in table if not row["dead"]]
    ids = lambda rows: {row["latent"] for row in rows}
    words: dict[int, set[str]] = {row["latent"]: set() for row in table}
    for row in contexts:
        text = "".join(p for token in show_tokens(row["token_bytes"]) for p in token if isinstance(p, str))
        words[row["latent"]] |= words_of(text)
    for row in table:
        words[row["latent"]] |= words_of(row["rule_name"] or "")
    expected = {
        "is:dead": ids(row for row in table if row["dead"]),
        "is:live": ids(live),
        "is:rare": ids(row for row in table if 0 < row["n_fired"] < 20),
        "is:dense": ids(row for row in table if row["dense"]),
        "is:dup": {11, 12},
        "is:rule": ids(row for row in table if row["rule_kind"]),
        "p>.93": ids(row for row in table if (row["rule_precision"] or 0) > 0.93),
        "r<=5%": ids(row for row in table if row["rule_recall"] is not None and row["rule_recall"] <= 0.05),
        "fires>=1000 -is:dense": ids(row for row in table if row["n_fired"] >= 1000 and not row["dense"]),
        'token:" self"': {latent for latent, token in prefers if token == " self"},
        "token:self": {latent for latent, token in prefers if token.strip().lower() == "self"},
        'token:"\\""': {latent for latent, token in prefers if token == '"'},
        "logit:none": ids(r for r in table if {b"None", b" None"} & set(r["logits_up_bytes"])),
        "doc:module_07": ids(row for row in contexts if "module_07" in row["doc_name"]),
        "near:17": {17, *table[17]["neighbours"]},
        "17": {17},
        "threading": {latent for latent, found in words.items() if any(w.startswith("threading") for w in found)},
        "ensure": {latent for latent, found in words.items() if any(w.startswith("ensure") for w in found)},
        "17 | is:dup": {11, 12, 17},
        "/^syntax/": ids(row for row in table if row["rule_kind"] == "syntax"),
        "label:keyword": ids(row for row in table if "keyword" in (row["rule_name"] or "")),
    }
    assert all(expected.values())
    for query, latents in expected.items():
        assert found_by(page, query) == latents, query


def test_a_sort_in_the_query_beats_the_address_and_a_click_replaces_it(
    report: Any, table: list[dict[str, Any]], visit: Callable[..., Any]
) -> None:
    page = visit(report.folder).open(f"#/latents?q={quote('is:live sort:-freq')}&sort=max")
    page.wait_for_selector(".rows .row")
    most = max(table, key=lambda row: row["n_fired"])["latent"]
    first = "() => Number([...document.querySelectorAll('.rows .row')].find(r => r.offsetTop === 0).dataset.id)"
    assert page.evaluate(first) == most
    assert page.get_attribute("[role=columnheader]:has([data-sort=frequency])", "aria-sort") == "descending"
    page.click("[data-sort=max]")
    page.wait_for_selector("[aria-sort=descending] [data-sort=max]")
    assert page.input_value("#query") == "is:live"


def test_parts_can_be_taken_out_and_wrong_ones_say_what_is_allowed(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open(f"#/latents?q={quote('is:dea fires>0 p>x split:3')}")
    page.wait_for_selector(".parts")
    assert page.locator(".part .bad").all_text_contents() == ["is:dea", "p>x", "split:3"]
    text = page.text_content(".parts")
    assert "is: takes dead, live, rare, dense, dup, rule, judged" in text
    assert "x is not a number" in text
    page.click("[aria-label='take out is:dea']")
    page.wait_for_function("() => document.querySelectorAll('.part').length === 3")
    assert page.input_value("#query") == "fires>0 p>x split:3"


def test_columns_are_chosen_and_kept_in_the_address(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latents")
    page.click("#columns summary")
    page.check("#columns input[value=mean]")
    page.wait_for_selector("[data-sort=mean]")
    page.uncheck("#columns input[value=precision]")
    page.wait_for_function("() => !document.querySelector('[data-sort=precision]')")
    page.reload()
    page.wait_for_selector("[data-sort=mean]")
    assert page.locator("[data-sort=precision]").count() == 0
    page.click(".rows .row >> nth=0")
    page.wait_for_selector("#view h1:has-text('Latent')")
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-sort=mean]")


def test_pages_of_a_hundred_replace_the_endless_list(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open("#/latents?sort=id")
    page.wait_for_selector(".rows .row")
    page.click("#paging")
    page.wait_for_selector(".pages")
    ids = "() => [...document.querySelectorAll('.rows .row')].map(r => Number(r.dataset.id)).sort((a, b) => a - b)"
    assert page.evaluate(ids) == list(range(100))
    assert page.evaluate("document.activeElement.id") == "paging"
    page.click("text=next ▸")
    page.wait_for_selector(".rows [data-id='150']")
    assert page.evaluate(ids) == list(range(100, 200))
    assert page.get_attribute(".rows [data-id='150']", "aria-rowindex") == "152"
    assert page.evaluate(
        "document.querySelector('.grid').scrollHeight === document.querySelector('.grid').clientHeight"
    )


def test_matches_are_saved_as_csv_and_json(
    report: Any, table: list[dict[str, Any]], tmp_path: Path, visit: Callable[..., Any]
) -> None:
    page = visit(report.folder).open(f"#/latents?q={quote('is:rule fires>200')}&sort=-max")
    page.wait_for_selector(".rows .row")
    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.click(f".list-tools button:text-is('{kind}')")
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    wanted = [row for row in table if row["rule_kind"] and row["n_fired"] > 200]
    wanted.sort(key=lambda row: -row["max_act"])
    rows = json.loads(saved["JSON"].read_text())
    assert [row["latent"] for row in rows] == [row["latent"] for row in wanted]
    assert [row["rule_name"] for row in rows if row["rule_kind"] == "token"] == [
        shown(row["rule_bytes"]) for row in wanted if row["rule_kind"] == "token"
    ]
    np.testing.assert_allclose([row["max"] for row in rows], [row["max_act"] for row in wanted], rtol=2e-4)
    with saved["CSV"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["latent"]) for line in lines] == [row["latent"] for row in wanted]
    assert not [cell for line in lines for cell in line.values() if re.match(r"\s*[=+@]", cell)]


def test_the_query_parser_never_throws_and_its_parts_are_the_text(report: Any, visit: Callable[..., Any]) -> None:
    page = visit(report.folder).open()
    rng = np.random.default_rng(0)
    pieces = [*'abis:-|/"\\<>=.()[]*+?17 é%\u202e\x00', "is:", "near:", "token:", "sort:-", "split:", "freq>"]
    pieces += ["label:/", "__proto__", "constructor:", "toString>", "🙂"]
    queries = ["".join(rng.choice(pieces, rng.integers(1, 20))) for _ in range(3000)]
    wrong = """queries => queries.filter(q => {
      const parts = SAE.parseQuery(q);
      const outside = parts.reduce((rest, p) => rest.replace(p.text, () => ''), q);
      return outside.trim() || parts.some(p => q.slice(p.start, p.end) !== p.text);
    })"""
    assert page.evaluate(wrong, queries) == []


def test_without_an_index_the_search_says_so_and_still_finds_rules(
    render: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    bare = render(n_latents=60, index_bytes=0)
    page = visit(bare.folder).open("#/latents?q=doc:module")
    page.wait_for_selector("#no-index")
    assert "more than 0 MB (index_bytes)" in page.text_content("#no-index")
    assert "index_bytes" in page.text_content(".parts")
    assert not (bare.folder / "data/topk-24/index").exists()
    rows = pq.read_table(bare.folder / "tables/latents.parquet").to_pylist()
    assert found_by(page, "label:operator") == {r["latent"] for r in rows if "operator" in (r["rule_name"] or "")}
