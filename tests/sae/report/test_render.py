import builtins
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from sae.errors import StoreError
from sae.report.inputs import unique_keys
from sae.report.numbers import decimal, percent, short, shorts, wilson
from sae.report.overview import step_of
from sae.report.pages import SPARK_STEPS, shuffled_order, sparklines
from sae.report.render import render_report
from sae.report.rules import label_of, rules_of
from sae.report.tables import README
from sae.store.artefacts import records


def test_second_render_is_byte_identical(sweep_report: Any, render: Callable[..., Any]) -> None:
    again = render(n_latents=70, sweep=True)
    assert again.folder != sweep_report.folder
    assert again.record.files == sweep_report.record.files
    assert again.record.content == sweep_report.record.content


def test_manifest_lists_every_file_with_its_hash(report: Any) -> None:
    manifest = json.loads((report.folder / "manifest.json").read_text())
    names = {p.relative_to(report.folder).as_posix() for p in report.folder.rglob("*") if p.is_file()}
    assert {entry["name"] for entry in manifest["files"]} == names - {"manifest.json"}
    for entry in manifest["files"]:
        data = (report.folder / entry["name"]).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (entry["n_bytes"], entry["xxh3"])
    assert manifest["inputs"] == report.spec.inputs
    assert manifest["report"] == report.record.ref


def test_first_view_fits_the_budget(report: Any) -> None:
    size = {path.suffix: path.stat().st_size for path in (report.folder / "assets").glob("app.*")}
    assert size[".js"] <= 120_000
    assert size[".js"] + size[".css"] + (report.folder / "index.html").stat().st_size <= 400_000


def test_hostile_strings_are_only_text_in_the_page(hostile_report: Any) -> None:
    page = (hostile_report.folder / "index.html").read_text()
    assert "<img" not in page
    assert "\u202e" not in page
    assert "\x00" not in page
    assert len(re.findall(r"<script\b", page)) == 2
    assert page.count("</script>") == 2
    assert "49" not in re.findall(r"\{\{ 7\*7 \}\}|>49<", page)


def test_every_query_of_the_readme_runs(sweep_report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(sweep_report.folder / "tables")
    queries = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    assert len(queries) == 10
    rows = [duckdb.sql(query).fetchall() for query in queries]
    assert all(rows), [query for query, found in zip(queries, rows, strict=True) if not found]
    assert [row[0] for row in rows[2]] == ["topk-24"]
    assert {row[1:3] for row in rows[7]} == {(11, 12)}


def test_tables_hold_all_latents_of_all_saes_under_their_keys(sweep_report: Any) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(sweep_report.folder / "tables/latents.parquet")
    assert table["sae"].value_counts().to_pylist() == [
        {"values": "topk-24", "counts": 70},
        {"values": "toy", "counts": 8},
    ]
    examples = pq.read_table(sweep_report.folder / "tables/examples.parquet")
    assert set(examples["sae"].to_pylist()) == {"topk-24", "toy"}


def test_without_vl_convert_the_plots_are_tables(
    synthetic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae.report import charts
    from sae.store.storage.filesystem import Storage

    real = charts.importlib.import_module

    def import_module(name: str) -> Any:
        if name == "vl_convert":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(charts.importlib, "import_module", import_module)
    storage = Storage(str(tmp_path))
    record = render_report(storage, synthetic.demo_spec(storage, n_latents=40), synthetic.LINEAGE)
    page = storage.read_bytes(record.path("index.html")).decode()
    assert "<svg" not in page
    assert page.count("<details open>") == 8
    assert charts.HOW_TO_GET_PLOTS.split("`")[0] in page


def test_unfinished_input_is_named(report: Any, tmp_path: Path) -> None:
    from sae.store.storage.filesystem import Storage

    with pytest.raises(StoreError, match=r"record\.json: not there"):
        render_report(Storage(str(tmp_path)), report.spec, [])


def test_the_record_can_be_verified(report: Any) -> None:
    assert records.verify(report.storage, report.record) == []
    assert report.record.metrics["n_latents"] == 300


def test_default_order_is_a_seeded_shuffle_of_live_latents_then_the_dead() -> None:
    n_fired = np.array([5, 0, 2, 9, 0, 1])
    order = shuffled_order(n_fired, 0)
    assert sorted(order[:4]) == [0, 2, 3, 5]
    assert list(order[4:]) == [1, 4]
    big = np.ones(500)
    assert list(shuffled_order(big, 1)) == list(shuffled_order(big, 1))
    assert list(shuffled_order(big, 1)) != list(shuffled_order(big, 2))


def test_the_highest_bin_of_every_sparkline_has_full_height() -> None:
    counts = [[0, n, 3, 0] for n in range(3, 200)]
    lines = sparklines(pa.chunked_array([pa.array(counts), pa.array([[0, 0, 0, 0]])]))
    assert set(lines[:-1, 0]) == {SPARK_STEPS}
    assert lines[:-1, 1].all()
    assert not lines[-1].any()


def test_wilson_interval_matches_worked_values() -> None:
    # 10 of 100: Wilson (1927) gives .0552 to .1744.
    assert wilson(10, 100) == pytest.approx((0.05523, 0.17437), abs=2e-5)
    # The upper bound for no firing in n tokens is 1 - .05^(1/n), about 3 / n.
    assert wilson(0, 1_021_904) == pytest.approx((0, 2.93e-6), rel=2e-3)


def test_the_first_definition_that_passes_is_the_label() -> None:
    row = {
        "top_tenth_kind": "token",
        "top_tenth_name": " self",
        "top_tenth_share": 0.4,
        "top_tenth_passes": False,
        "mass_kind": "previous token",
        "mass_name": "is",
        "mass_share": 0.71,
        "mass_passes": True,
        "top_20_kind": None,
    }
    label = label_of(rules_of(row))
    assert label is not None
    assert label.dump() == ["after", ["is"], 0.71, "of its activation", 1]
    assert label_of(rules_of({"top_tenth_kind": None})) is None


def test_colour_steps_are_linear_in_the_share_of_the_maximum() -> None:
    assert [step_of(value, 6.0) for value in (0.0, 0.01, 1.0, 1.01, 5.5, 6.0, 7.0)] == [0, 1, 1, 2, 6, 6, 6]
    assert step_of(float("nan"), 1.0) == 0


def test_keys_are_safe_and_unique() -> None:
    assert unique_keys(["TopK 24", "topk-24", "../x", "日本", "<b>"]) == ["topk-24", "topk-24-2", "x", "sae", "b"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1953, ".195"),
        (24, "24.0"),
        (1204.4, "1,204"),
        (-0.05, "-.0500"),
        (0.99996, "1.00"),
        (2.9e-6, "2.90e-6"),
        (0, "0"),
    ],
)
def test_numbers_have_three_digits_and_no_leading_zero(value: float, text: str) -> None:
    assert decimal(value) == text


def test_shortest_decimals_of_arrays_are_those_of_values() -> None:
    rng = np.random.default_rng(0)
    odd = [0.0, -0.0, 1e-45, 3.4e38, np.inf, 1.0, 16_777_216, 1e22, 123_456.7, 0.1]
    values = np.concatenate([rng.random(500), rng.lognormal(0, 20, 500), -rng.random(9), odd]).astype(np.float32)
    wanted = [short(value) for value in values]
    assert shorts(pa.array(values)).to_pylist() == wanted
    lists = pa.array([wanted[:3], [], wanted[3:7], wanted[7:9]], pa.list_(pa.float32()))
    assert shorts(lists[1:3]).to_pylist() == [[], wanted[3:7]]
    assert shorts(pa.array([None, np.nan], pa.float32())).to_pylist()[0] is None


def test_what_is_not_known_is_said() -> None:
    assert decimal(None) == decimal(float("nan")) == percent(None) == "n/a"


def test_nothing_is_imported_that_the_extra_brings() -> None:
    assert not hasattr(builtins, "vl_convert")
    import subprocess
    import sys

    code = "import sys, sae.report.render; sys.exit('vl_convert' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
