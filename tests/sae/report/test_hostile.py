"""Tokens, labels, names and a model's words that try to be markup: in every view they are text, as it is stored."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sae.report.display import flat, plain, show_text, show_tokens

pytestmark = pytest.mark.browser

FOREIGN = """() => {
  const found = [...document.querySelectorAll('img, iframe, object, embed, video, audio, base, [http-equiv=refresh]')];
  const ours = /^(assets|data)\\/[a-z0-9_./-]+\\.js$/;
  const strange = script => script.id !== 'summary' && (!ours.test(script.getAttribute('src')) || script.textContent);
  found.push(...[...document.scripts].filter(strange));
  for (const element of document.querySelectorAll('*'))
    for (const { name, value } of element.attributes)
      if (/^on/i.test(name) || /^\\s*javascript:/i.test(value)) found.push(element);
  return found.map(element => element.outerHTML.slice(0, 200));
}"""
INVISIBLE = re.compile("[\u202e\u2028\x00\u200b\ufeff]")


@pytest.fixture(scope="module")
def hostile(render: Callable[..., Any]) -> Any:
    """A report in which every foreign string is hostile."""
    return render(whole=True, n_latents=120, n_other=70, hostile=True)


@pytest.fixture(scope="module")
def saes(hostile: Any) -> list[dict[str, Any]]:
    text = (hostile.folder / "index.html").read_text().split('id="summary">')[1].split("</script>")[0]
    return list(json.loads(text)["saes"])


@pytest.fixture
def opened(hostile: Any, visit: Callable[..., Any]) -> Iterator[Any]:
    """The overview of the report; whatever was done on the page, it stays harmless."""
    page = visit(hostile.folder).open()
    yield page
    tame(page)


def tame(page: Any) -> None:
    """Nothing ran, nothing is there that is not ours, nothing is wider than the page, nothing is invisible."""
    assert page.evaluate("typeof window.PWN") == "undefined", page.url
    assert page.evaluate(FOREIGN) == [], page.url
    said = page.evaluate("[document.body.innerText, document.title, document.querySelector('#announce').textContent]")
    assert not INVISIBLE.search("".join(said)), page.url
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (page.url, width)


def go(page: Any, address: str, there: str) -> None:
    page.evaluate("hash => location.hash = hash", address)
    page.wait_for_selector(there, state="visible")


@pytest.mark.slow
def test_every_view_and_what_can_be_done_in_it(opened: Any, saes: list[dict[str, Any]]) -> None:
    page, (a, b, toy) = opened, [sae["key"] for sae in saes]
    tame(page)
    page.click("text=another 12")
    page.wait_for_function("() => location.hash.includes('draw=1')")
    tame(page)
    page.click("#help")
    page.wait_for_selector("dialog[open]")
    tame(page)
    page.keyboard.press("Escape")
    for query in ("<img src=x onerror=window.PWN=1>", 'token:"</script>"', "/<script>/", "doc:<img", "label:<img"):
        page.fill("#query", query)
        page.press("#query", "Enter")
        page.wait_for_selector(".parts")
        tame(page)
    go(page, f"#/s/{a}/latents?page=1", ".rows .row .t")
    tame(page)
    go(page, f"#/s/{a}/compare", ".pair-list tr")
    for number in range(4):
        page.click(f".pair-list button[aria-expanded=false] >> nth={number}")
    page.wait_for_selector(".beside .contexts")
    page.hover(".beside .context .t.peak >> nth=0")
    for details in page.query_selector_all("#view .plot-figure summary"):
        details.click()
    tame(page)
    for shown in ("only-a", "near-b", "split"):
        go(page, f"#/compare/{a}/{b}/{shown}", f".pair-tabs [data-list={shown}][aria-current]")
        tame(page)
    for key in (a, b):
        go(page, f"#/s/{key}/map", ".map-near li")
        page.click(".map-table summary")
        page.select_option("#map-colour", "kind")
        box = page.locator("canvas.map").bounding_box()
        for step in range(60):  # across the map, over some of its latents
            page.mouse.move(box["x"] + box["width"] * (0.3 + step / 150), box["y"] + box["height"] / 2)
        tame(page)
    go(page, f"#/s/{a}/judge", ".verdicts button")
    page.keyboard.press("3")
    page.wait_for_selector("#revealed")
    tame(page)
    go(page, f"#/s/{toy}/toy", ".heat td")
    tame(page)
    go(page, f"#/s/{toy}/latent/0", ".contexts .t")
    tame(page)
    go(page, "#/<img src=x onerror=window.PWN=1>", "h1:text-is('Not in this report')")
    tame(page)
    go(page, "#/s/<script>alert(1)</script>/latents", "h1:text-is('Not in this report')")


def test_passages_and_typed_words_are_text(opened: Any, hostile: Any, saes: list[dict[str, Any]]) -> None:
    page = opened
    stored = pq.read_table(hostile.folder / "tables/passages.parquet").to_pylist()
    mine = [row for row in stored if row["sae"] == saes[0]["key"]]
    go(page, "#/try", ".reader .firing li")
    for number, passage in enumerate(mine):
        page.select_option(".choose select", str(number))
        n = len(passage["token_ids"])
        page.wait_for_function("n => document.querySelectorAll('.reading .t').length === n", arg=n)
        page.wait_for_selector(f"text={passage['seq']}", state="attached")
        assert shown_tokens(page, ".reading") == drawn(passage["token_bytes"])
        page.hover(".reading .t >> nth=7")
        page.click(".on-token [data-latent] >> nth=0")
        tame(page)
    page.fill("textarea", "<img src=x onerror=window.PWN=1> </script><script>window.PWN=1</script>")
    page.click("text=Look up")
    page.wait_for_selector(".words div")


def test_contexts_are_what_is_stored(opened: Any, hostile: Any, saes: list[dict[str, Any]], synthetic: Any) -> None:
    rows = pq.read_table(hostile.folder / "tables/examples.parquet", filters=[("sae", "=", saes[0]["key"])]).to_pylist()
    wanted = set(synthetic.HOSTILE)
    for latent in range(120):
        mine = [row for row in rows if row["latent"] == latent and row["group"] == "top"]
        seen = wanted & {token for row in mine for token in row["token_bytes"]}
        if not seen or len(mine) < 5:
            continue
        wanted -= seen
        go(opened, f"#/latent/{latent}", f"h1:text-is('Latent {latent}')")
        for i, row in enumerate(mine):
            found = shown_tokens(opened, f"[data-group=top] li:nth-child({i + 1}) .context")
            assert found == drawn(row["token_bytes"])
            where = opened.text_content(f"[data-group=top] li:nth-child({i + 1}) .where span")
            assert where == plain(row["doc_name"])
        opened.hover("[data-group=top] .t.peak >> nth=0")
        tame(opened)
    assert not wanted


def shown_tokens(page: Any, line: str) -> list[str]:
    return list(page.eval_on_selector_all(f"{line} >> .t", "tokens => tokens.map(t => t.textContent)"))


def drawn(tokens: list[bytes]) -> list[str]:
    """Text and chips of each token as the page draws them; long ones are cut."""
    texts = ["".join(part if isinstance(part, str) else part[0] for part in token) for token in show_tokens(tokens)]
    return [text if len(text) <= 80 else f"{text[:80]}… {len(text)} characters" for text in texts]


def test_names_title_and_a_models_words_are_what_was_given(
    opened: Any, hostile: Any, saes: list[dict[str, Any]]
) -> None:
    page, config = opened, hostile.spec.config
    assert page.title() == page.text_content("#overview h1") == plain(config.title, 120)
    names = [plain(entry.name, 60) for entry in hostile.spec.saes]
    assert page.eval_on_selector_all("#sae-switch option", "all => all.map(o => o.textContent)") == names
    go(page, "#/compare", ".pair-list tr")
    assert page.eval_on_selector_all("#compare-a option", "all => all.map(o => o.textContent)") == names
    go(page, f"#/s/{saes[0]['key']}/latent/2", "[data-model] q")
    table = pq.read_table(hostile.folder / "tables/latents.parquet").to_pylist()
    row = next(row for row in table if row["latent"] == 2 and row["model_name"])
    words = "".join(part if isinstance(part, str) else part[0] for part in show_text(row["model_explanation"]))
    assert page.text_content("[data-model] q") == words
    assert page.text_content("[data-model] .badge") == f"model {plain(row['model_name'], 80)}"


def test_exported_lists_hold_text_and_no_formula(
    opened: Any, hostile: Any, saes: list[dict[str, Any]], tmp_path: Path
) -> None:
    page = opened
    go(page, "#/latents?sort=id", ".rows .row .t")
    saved = {}
    for kind in ("CSV", "JSON"):
        with page.expect_download() as download:
            page.click(f".list-tools button:text-is('{kind}')")
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    table = pq.read_table(hostile.folder / "tables/latents.parquet", filters=[("sae", "=", saes[0]["key"])]).to_pylist()
    rows = json.loads(saved["JSON"].read_text())
    with saved["CSV"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [row["latent"] for row in rows] == [int(line["latent"]) for line in lines] == list(range(120))
    tokens = {row["latent"]: flat(show_tokens([row["rule_bytes"]])[0]) for row in table if row["rule_bytes"]}
    assert {row["latent"]: row["rule_name"] for row in rows if row["latent"] in tokens} == tokens
    assert not [cell for line in lines for cell in line.values() if re.match(r"\s*[=+@-][^\d.]", cell)]
    assert not INVISIBLE.search(saved["CSV"].read_text() + saved["JSON"].read_text())


def test_what_got_in_all_the_same_is_not_fetched(hostile: Any, visit: Callable[..., Any]) -> None:
    """The page's policy, against an image, a call and a script of another origin."""
    visited = visit(hostile.folder)
    page = visited.open()
    page.evaluate("""() => {
      document.body.append(Object.assign(new Image(), { src: 'https://example.invalid/a.png' }));
      document.body.append(Object.assign(document.createElement('script'), { src: 'https://example.invalid/a.js' }));
      document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.PWN = 1' }));
      document.body.insertAdjacentHTML('beforeend', '<b onclick="window.PWN = 1" id="bait">x</b>');
      document.querySelector('#bait').click();
      return fetch('https://example.invalid/b').catch(() => {});
    }""")
    assert page.evaluate("typeof window.PWN") == "undefined"
    assert len(visited.problems) >= 5
    assert all("Content Security Policy" in problem for problem in visited.problems), visited.problems
    visited.problems.clear()
