"""A model's words on the page: beside the rule, marked as a model's, searchable, and safe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.explain.config import EndpointModel, LabelsSpec
from sae.explain.label import labels_schema
from sae.report.config import ReportSpec
from sae.report.model_labels import model_label, with_model_labels
from sae.report.render import render_report
from sae.store.artefacts.records import commit
from sae.store.storage.filesystem import Storage

MODEL = "stub <b>7B</b>"
N_LATENTS = 40


def label(latent: int, explanation: str | None, error: str | None = None, **scores: float) -> dict[str, Any]:
    return {"latent": latent, "explanation": explanation, "error": error, "model": MODEL, "n_unparsed": 0} | scores


def scored(test: str, value: float, low: float, high: float, n: int) -> dict[str, float]:
    name = f"{test}_balanced_accuracy"
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{test}_n": n}


@pytest.fixture(scope="module")
def labelled(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A report with a model's labels of some latents (its folder), and its table of latents."""
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    spec = synthetic.demo_spec(storage, n_latents=N_LATENTS)
    labels = LabelsSpec(
        questions="questions/" + "0" * 16,
        explainer=EndpointModel(model=MODEL, temperature=0.0),
        contexts_per_request=8,
        max_tokens=100,
        seed=0,
    )
    both = scored("detection", 0.83, 0.7, 0.9, 32) | scored("fuzzing", 0.75, 0.5, 0.875, 16)
    rows = [label(latent, f"zebra {latent} words", **both) for latent in range(N_LATENTS)]
    rows[1] = label(1, synthetic.HOSTILE_TEXT, **both)
    rows[2] = label(2, None, f"status 500: {synthetic.HOSTILE_TEXT}")
    rows[3] = label(3, "half a zebra", "status 503", **scored("detection", 1.0, 0.8, 1.0, 8))
    rows.pop(4)
    with storage.staging() as folder:
        pq.write_table(pa.Table.from_pylist(rows, labels_schema()), folder / "labels.parquet")
        commit(storage, labels, folder, {}, seconds=0.0)
    spec = ReportSpec.model_validate(
        spec.model_dump() | {"saes": [entry.model_dump() | {"labels": labels.ref} for entry in spec.saes]}
    )
    record = render_report(storage, spec, [])
    folder = Path(storage.full(record.folder))
    return folder, pq.read_table(folder / "tables" / "latents.parquet")


def test_words_and_scores_stand_beside_the_rule_with_the_model_s_name(
    labelled: tuple[Path, pa.Table], visit: Callable[..., Any]
) -> None:
    folder, _ = labelled
    page = visit(folder).open("#/latent/5")
    lines = page.locator(".label-row")
    assert lines.count() == 2
    assert "zebra" not in lines.nth(0).inner_text()
    text = lines.nth(1).inner_text()
    assert text.startswith(f"model {MODEL}")
    assert "zebra 5 words" in text
    assert "detection .83 [.70, .90]" in text
    assert "fuzzing .75 [.50, .88]" in text
    title = page.get_attribute("[data-model] [title^='told from its words, on']", "title")
    assert "balanced accuracy of 32 answers" in str(title)


def test_what_the_model_did_not_say_is_said(labelled: tuple[Path, pa.Table], visit: Callable[..., Any]) -> None:
    visited = visit(labelled[0])
    page = visited.open("#/latent/2")
    assert "gave no explanation: status 500: <img" in page.inner_text("[data-model]")
    page.evaluate("location.hash = '#/latent/3'")
    page.wait_for_selector("h1:text-is('Latent 3')")
    assert "fuzzing n/a not all was scored: status 503" in page.inner_text("[data-model]")
    page.evaluate("location.hash = '#/latent/4'")
    page.wait_for_selector("h1:text-is('Latent 4')")
    assert page.locator("[data-model]").count() == 0


def test_hostile_words_stay_text(labelled: tuple[Path, pa.Table], synthetic: Any, visit: Callable[..., Any]) -> None:
    visited = visit(labelled[0], viewport={"width": 390, "height": 700})
    for address in ("#/latent/1", "#/latent/2", "#/latents?q=id%3A1", "#/latents?q=label%3Aonerror"):
        page = visited.open(address)
        page.wait_for_timeout(100)
        assert page.evaluate("window.PWN") is None
        assert page.locator("img, iframe, object, embed, [data-model] b, .rule b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
        text = page.evaluate("document.body.innerText")
        assert "\u202e" not in text
        assert "\x00" not in text
        page.goto("about:blank")


def test_words_are_found_by_label_and_listed_where_there_is_no_rule(
    labelled: tuple[Path, pa.Table], visit: Callable[..., Any]
) -> None:
    folder, table = labelled
    page = visit(folder).open("#/latents?q=label%3Azebra")
    page.wait_for_selector(".grid .row[data-id]")
    assert page.inner_text("#n-results").startswith(f"{N_LATENTS - 3} of ")
    rules = dict(zip(table["latent"].to_pylist(), table["rule_kind"].to_pylist(), strict=True))
    shown = page.eval_on_selector_all(
        ".grid .row[data-id]",
        "rows => rows.map((row) => [Number(row.dataset.id), row.querySelector('.rule')?.textContent ?? ''])",
    )
    assert {rules[latent] is None for latent, _ in shown} == {True, False}
    for latent, text in shown:
        assert ("model: " in text) == (rules[latent] is None), (latent, text)


def test_the_overview_sums_up_what_the_words_are_worth(
    labelled: tuple[Path, pa.Table], visit: Callable[..., Any]
) -> None:
    page = visit(labelled[0]).open()
    table = page.locator("section[aria-label='Labels by a model']")
    rows = [
        row.split("\t")
        for row in table.locator("tbody").inner_text().replace("\n", "|").replace("\t|", "\t").split("|")
        if "\t" in row
    ]
    # 39 were asked, one gave no words; one of 38 has another detection score and none of fuzzing.
    figures = [row[1:] for row in rows]
    assert figures[0][:1] == ["38"]
    assert figures[1] == ["38", ".834", ".825 to .844"]
    assert figures[2] == ["37", ".750", ".750 to .750"]
    assert figures[3][:1] == [str(N_LATENTS)]
    assert "of 39 asked about" in table.inner_text()
    table.locator("summary").click()
    assert f"The words are those of {MODEL}, which also answered. Chance is .5." in table.inner_text()
    assert "<b>" not in table.inner_html().replace("&lt;b&gt;", "")


def test_without_labels_the_overview_has_no_such_table(report: Any) -> None:
    assert "Labels by a model" not in (report.folder / "index.html").read_text()


def test_the_open_table_has_the_words_and_the_scores(labelled: tuple[Path, pa.Table], synthetic: Any) -> None:
    rows = labelled[1].sort_by("latent").to_pylist()
    assert rows[1]["model_explanation"] == synthetic.HOSTILE_TEXT
    assert (rows[5]["model_name"], rows[5]["model_detection"], rows[5]["model_fuzzing_high"]) == (MODEL, 0.83, 0.875)
    assert rows[4]["model_name"] is rows[4]["model_explanation"] is None


def test_without_labels_the_columns_are_null_and_the_page_says_nothing() -> None:
    table = with_model_labels(pa.table({"latent": [0, 1]}), None)
    assert [model_label(row) for row in table.to_pylist()] == [None, None]
    assert "model_detection_low" in table.column_names
