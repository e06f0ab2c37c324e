"""Judge mode in a real browser, and the table of its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sae.errors import InputError
from sae.report.judgements import VERDICTS, Judgements, judgement_table, read_judgements
from sae.report.numbers import percent, wilson


def file_of(verdicts: dict[int, str], **changes: Any) -> dict[str, Any]:
    entries = [{"latent": latent, "verdict": verdict} for latent, verdict in verdicts.items()]
    whole = {"format": 1, "report": "reports/0123456789abcdef", "title": "t", "sae": "topk-24", "units": "latents"}
    return whole | {"n": 30, "seed": 0, "verdicts": entries} | changes


@pytest.mark.browser
def test_a_draw_is_judged_blind_kept_exported_and_imported(
    report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    table = pq.read_table(report.folder / "tables/latents.parquet").to_pylist()
    page = visit(report.folder).open("#/judge?n=4&seed=7")
    page.wait_for_selector(".verdicts button")
    assert page.locator(".label-row, .counted, #revealed").count() == 0
    assert "Near misses " in page.text_content("[data-group=miss] h2")
    judged = []
    for key in ("1", "3", "1", "2"):
        page.keyboard.press(key)
        page.wait_for_selector("#revealed")
        judged.append(int(page.text_content("#revealed a").split()[1]))
        page.keyboard.press("]")
        page.wait_for_function("() => !document.querySelector('#revealed')")
    assert len(set(judged)) == 4
    assert not [latent for latent in judged if table[latent]["dead"]]
    assert page.text_content("#judged") == "4 of 4 judged"
    low, high = wilson(2, 4)
    cells = page.locator("#judge-result tbody tr").first.locator("th, td").all_text_contents()
    assert cells == ["clear", "2", "50.0 %", f"{percent(low)} to {percent(high)}"]

    with page.expect_download() as download:
        page.click("#judge-result button:text-is('export')")
    exported = tmp_path / "judged.json"
    download.value.save_as(exported)
    judgements = read_judgements(exported)
    assert judgements.report == report.record.ref
    assert {j.latent: j.verdict for j in judgements.verdicts} == dict(
        zip(judged, ("clear", "unclear", "clear", "partly"), strict=True)
    )
    again = visit(report.folder).open("#/judge?n=4&seed=7")
    assert again.text_content("#judged") == "0 of 4 judged"
    again.set_input_files("input[type=file]", exported)
    again.wait_for_function("() => document.querySelector('#judged').textContent === '4 of 4 judged'")
    again.goto(f"{again.url.split('#')[0]}#/latents?q=is:judged")
    again.wait_for_function("() => document.querySelector('#n-results')?.textContent === '4 of 300'")


@pytest.mark.browser
def test_another_seed_draws_others_and_foreign_files_are_refused(
    report: Any, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    page = visit(report.folder).open("#/judge?n=5&seed=1")
    contexts = "() => document.querySelector('.groups, .latent').textContent"
    first = page.evaluate(contexts)
    page.fill("input[name=seed]", "2")
    page.click("text=another draw")
    page.wait_for_function("() => location.hash.includes('seed=2')")
    page.wait_for_function("t => document.querySelector('.latent').textContent !== t", arg=first)
    for number, (content, problem) in enumerate(
        (
            ("{", "not JSON"),
            ("null", "no file of judgements"),
            (json.dumps(file_of({1: "clear"})), "reports/0123456789abcdef"),
            (json.dumps(file_of({1: "<img>"}, report=report.record.ref)), "A verdict is one of"),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        page.set_input_files("input[type=file]", path)
        page.wait_for_function("t => document.querySelector('#imported').textContent.includes(t)", arg=problem)
    assert page.text_content("#judged") == "0 of 5 judged"


def test_the_table_counts_verdicts_with_their_intervals() -> None:
    files = [Judgements.model_validate(file_of(dict(zip(range(10), ["clear"] * 7 + ["partly"] * 3, strict=True))))]
    lines = judgement_table(files)
    assert lines[0].split() == ["report", "of", "judged", *VERDICTS]
    # Wilson: 7 of 10 gives .397 to .892, and 0 of 10 an upper bound of 1 - .05^(1/10).
    assert "10 of 30" in lines[1]
    assert "7 (70.0 %, .397 to .892)" in lines[1]
    assert "0 (0 %, 0 to .259)" in lines[1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "no file that judge mode"),
        (json.dumps(file_of({1: "good"})), "Input should be 'clear', 'partly' or 'unclear'"),
        (json.dumps(file_of({}, format=2)), "Input should be 1"),
        (json.dumps(file_of({}) | {"verdicts": [{"latent": 1, "verdict": "clear"}] * 2}), "two verdicts on one latent"),
    ],
)
def test_files_that_judge_mode_did_not_write_are_refused(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(content)
    with pytest.raises(InputError, match=problem):
        read_judgements(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.json: cannot be read"):
        read_judgements(tmp_path / "missing.json")


def test_the_command_line_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    path = tmp_path / "f.json"
    path.write_text(json.dumps(file_of({1: "clear", 2: "unclear"})))
    assert main(["report", "--judgements", str(path)]) == 0
    assert "1 (50.0 %" in capsys.readouterr().out
    assert main(["report", "--judgements", str(tmp_path / "none.json")]) == 2
