"""The comparison and the map in a real browser, on two SAEs made up of each other's latents."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.report import compare
from sae.report.compare import comparable_pairs
from sae.report.config import ReportConfig, ReportedSAE, ReportSpec
from sae.report.inputs import open_inputs, unique_keys
from sae.report.render import render_report
from sae.store.storage.filesystem import Storage
from tests.sae.report.conftest import import_beside

pytestmark = pytest.mark.browser

N_SHARED, N_A, N_B, D_IN = 60, 80, 101, 64
NAMES = ("small", "large<img src=x onerror=window.PWN=1>")
LARGE = unique_keys(list(NAMES))[1]
SPLIT = 10
"""The latent of a that b has twice, as SPLIT and as its last."""


def two_decoders() -> tuple[np.ndarray, np.ndarray]:
    """[N_A, D_IN] and [N_B, D_IN]: N_SHARED latents are the same, one is there twice in b, the others are random."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(N_A, D_IN)), rng.normal(size=(N_B, D_IN))
    b[:N_SHARED] = a[:N_SHARED] + 0.05 * rng.normal(size=(N_SHARED, D_IN))
    b[-1] = a[SPLIT] + 0.2 * rng.normal(size=D_IN)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.fixture(scope="module")
def sweep(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, ReportSpec]:
    """The two with made-up evaluations and statistics."""
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    saes = []
    for name, W_dec in zip(NAMES, two_decoders(), strict=True):
        statistics = synthetic.write_statistics(storage, name, len(W_dec), extra=synthetic.HOSTILE)
        evaluation = synthetic.write_evaluation(storage, name, len(W_dec))
        sae = import_beside("synthetic_whole").write_weights(storage, name, W_dec)
        found = {"sae": sae, "evaluation": evaluation, "statistics": statistics}
        saes.append(ReportedSAE(name=name, family=name, sparsity="k 8", **found))
    return storage, ReportSpec(config=ReportConfig(title="Two SAEs", chunk_bytes=20_000), saes=tuple(saes))


@pytest.fixture(scope="module")
def pair(sweep: tuple[Storage, ReportSpec], synthetic: Any) -> Path:
    """The folder of a report on the two."""
    storage, spec = sweep
    record = render_report(storage, spec, synthetic.LINEAGE)
    return Path(storage.full(record.folder))


def summary_of(folder: Path) -> dict[str, Any]:
    text = (folder / "index.html").read_text().split('id="summary">')[1].split("</script>")[0]
    return dict(json.loads(text))


def test_only_a_report_with_two_comparable_saes_offers_the_comparison(pair: Path, report: Any) -> None:
    assert summary_of(pair)["compare"] == {"pairs": [["small", LARGE]], "leftOut": 0}
    assert {"compare", "map"} <= set(summary_of(pair)["views"])
    assert "compare" not in summary_of(report.folder)["views"]
    assert "Compare</a>" not in (report.folder / "index.html").read_text()
    assert all(file.stat().st_size < 1_000_000 for file in (pair / "data/compare").rglob("*.js"))


def test_every_two_saes_are_compared_up_to_a_limit_and_then_neighbouring_widths(
    sweep: tuple[Storage, ReportSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_inputs(*sweep) as (small, large):
        assert comparable_pairs([small, large]) == ([(0, 1)], 0)
        assert len(comparable_pairs([small] * 8)[0]) == 28
        widths = [dataclasses.replace(large, latents=large.latents.slice(0, n)) for n in (90, 30, 60, *range(31, 37))]
        by_width, left_out = comparable_pairs(widths)
        assert sorted(by_width) == [(0, 2), (1, 3), (2, 8), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
        assert left_out == 28
        monkeypatch.setattr(compare, "MAX_WORK", 3 * N_A * N_A - 1)
        assert comparable_pairs([small] * 3) == ([(0, 1), (1, 2)], 1)
        elsewhere = dataclasses.replace(large, snapshot="activations/fedcba9876543210")
        assert compare.compare(small, elsewhere, 0).about["way"] == "firing"
        assert comparable_pairs([small, dataclasses.replace(elsewhere, rows=None)]) == ([], 0)


def test_comparison_shows_classes_pairs_and_contexts_side_by_side(pair: Path, visit: Callable[..., Any]) -> None:
    page = visit(pair).open("#/compare")
    assert page.eval_on_selector("#compare-a", "e => e.value") == "small"
    assert page.eval_on_selector("#compare-b", "e => e.value") == LARGE
    assert page.locator(".pair-numbers tbody tr").count() >= 7
    assert page.locator(".pair-plot").count() == 3
    sizes = page.eval_on_selector_all(
        ".pair-tabs a",
        "links => Object.fromEntries(links.map(a => [a.dataset.list, a.querySelector('b').textContent]))",
    )
    rows = page.eval_on_selector_all(".pair-list tbody tr", "rows => rows.map(r => Number(r.dataset.id))")
    assert len(rows) == int(sizes["matched"])
    assert N_SHARED * 0.8 < len(rows) < N_SHARED
    page.click("[data-sort='score']")
    page.wait_for_selector("th[aria-sort='descending']")
    shown = page.eval_on_selector_all(".pair-list tbody tr", "rows => rows.map(r => Number(r.cells[3].textContent))")
    assert shown == sorted(shown, reverse=True)
    page.click(".pair-list button >> nth=0")
    page.wait_for_selector(".beside .contexts")
    assert page.locator(".beside > div").count() == 2
    page.hover(".beside .context .t.peak >> nth=0")
    assert "position" in page.inner_text(".beside-row .readout")
    page.click(".plot-figure summary >> nth=0")
    page.wait_for_selector(".plot-figure details[open] td")
    page.click(".swap")
    page.wait_for_function("() => document.querySelector('#compare-a').value !== 'small'")
    back = page.eval_on_selector_all(
        ".pair-tabs a",
        "links => Object.fromEntries(links.map(a => [a.dataset.list, a.querySelector('b').textContent]))",
    )
    assert page.eval_on_selector("#sae-switch", "e => e.value") == LARGE
    assert back["matched"] == sizes["matched"]
    assert back["merged"] == " → ".join(reversed(sizes["split"].split(" → ")))
    assert (back["only-b"], back["near-a"]) == (sizes["only-a"], sizes["near-b"])


def test_unknown_pairs_and_lists_are_said_to_be_unknown(pair: Path, visit: Callable[..., Any]) -> None:
    for address in ("#/compare/small/none", "#/compare/small/small", f"#/compare/small/{LARGE}/other"):
        page = visit(pair).open(address)
        assert page.inner_text("#view h1") == "Not in this report"


def test_latent_page_says_what_became_of_the_latent(pair: Path, visit: Callable[..., Any]) -> None:
    page = visit(pair).open("#/s/small/latent/0")
    page.wait_for_function("() => !document.querySelector('.elsewhere dd').textContent.includes('…')")
    assert page.inner_text(".elsewhere dt") == NAMES[1]
    assert page.inner_text(".elsewhere dd").startswith(("one-to-one with 0 (", "nearest 0 ("))


def test_split_query_finds_the_other_parts(pair: Path, visit: Callable[..., Any]) -> None:
    page = visit(pair).open("#/s/small/latents?q=split:0")
    page.wait_for_selector(".rows .row")
    assert page.get_attribute(".rows .row", "data-id") == "0"


def test_map_is_drawn_pointed_at_searched_and_walked_by_keys(pair: Path, visit: Callable[..., Any]) -> None:
    page = visit(pair).open(f"#/s/{LARGE}/map")
    page.wait_for_selector(".map-near li")
    assert "live latents" in page.inner_text(".list-head .note")
    assert page.locator(".map-near li").count() == 8
    inked = """() => {
      const canvas = document.querySelector('canvas.map');
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return data.filter((value, i) => i % 4 === 3 && value > 0).length;
    }"""
    page.wait_for_function(f"() => ({inked})() > 1000")
    page.click(".map-table summary")
    page.wait_for_selector(".map-table td")
    latent = page.inner_text(".map-table tbody th >> nth=0")
    x, y = (float(page.inner_text(f".map-table tbody tr:first-child td:nth-child({i})")) for i in (5, 6))
    box = page.locator("canvas.map").bounding_box()
    unit = 0.94 * min(box["width"], box["height"])
    spot = (box["x"] + box["width"] / 2 + (x - 0.5) * unit, box["y"] + box["height"] / 2 - (y - 0.5) * unit)
    page.mouse.move(*spot)
    page.wait_for_selector(".map-info a")
    assert page.inner_text(".map-info a").startswith("Latent ")
    page.focus("canvas.map")
    before = page.inner_text(".list-head .note")
    for _ in range(4):
        page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("t => document.querySelector('.list-head .note').textContent !== t", arg=before)
    page.select_option("#map-colour", "kind")
    assert page.locator(".map-key").count() == 5
    page.fill("#query", f"id:{latent}")
    page.wait_for_function("() => document.querySelector('.list-head .note')?.textContent.startsWith('1 match;')")
    assert "/map?q=" in page.url
    page.wait_for_selector(".map-near li")
    page.click(".map-near a")
    page.wait_for_selector(f"h1:text-is('Latent {latent}')")
    page.go_back()
    page.wait_for_selector("canvas.map")


def test_views_stay_as_wide_as_the_page_and_run_nothing(pair: Path, visit: Callable[..., Any]) -> None:
    for address in ("#/compare", f"#/compare/small/{LARGE}/only-b", f"#/s/{LARGE}/map"):
        page = visit(pair, color_scheme="dark", viewport={"width": 390, "height": 800}).open(address)
        for button in page.query_selector_all(".pair-list button")[:6]:
            button.click()
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("window.PWN") is None
        assert page.locator("#view img, #view script, #view iframe").count() == 0


def test_links_beside_the_map_stay_while_it_is_zoomed_about_the_same_place(
    pair: Path, visit: Callable[..., Any]
) -> None:
    """A link that is made again under the pointer loses the click."""
    page = visit(pair).open(f"#/s/{LARGE}/map")
    page.focus(".map-near a")
    before = page.inner_text(".list-head .note")
    for _ in range(4):
        page.click("[aria-label='zoom in (+)']")
    page.focus(".map-near a")
    page.evaluate("document.querySelector('.map-near a').same = true")
    page.wait_for_function("t => document.querySelector('.list-head .note').textContent !== t", arg=before)
    assert page.evaluate("document.querySelector('.map-near a').same")
