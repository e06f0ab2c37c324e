"""The whole DAG under Prefect: what is computed, what is found in the store, what a change touches."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.show import show
from sae.errors import InputError, StoreError
from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import require_record, verify
from sae.store.snapshots import part_sets
from sae.store.snapshots.snapshot import read_snapshot
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config, with_settings, write_corpus

pytestmark = pytest.mark.usefixtures("prefect_backend")


def run(config: PipelineConfig, **options: Any) -> list[dict[str, Any]]:
    from flows.pipeline import pipeline

    return pipeline(config, **options)


def computed(outcomes: list[dict[str, Any]]) -> set[str]:
    return {outcome["stage"] for outcome in outcomes if outcome["outcome"] == "computed"}


def parts_by_outcome(outcomes: list[dict[str, Any]]) -> Counter[str]:
    """How many parts were extracted, and how many found."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome["task"] == "extract_parts":
            counts[outcome["outcome"]] += outcome["n_parts"]
    return counts


def contents(config: PipelineConfig) -> dict[str, str]:
    storage = Storage(config.execution.root)
    return {spec.ref: require_record(storage, spec.ref).content for spec in make_plan(config).specs()}


def recorded_files(root: str) -> dict[str, list[dict[str, Any]]]:
    """The files that every commit record of a root names, parts included, with their sizes and hashes."""
    paths = [*Path(root).glob("*/*/record.json"), *Path(root).glob("*/*/part-*.json")]
    return {str(path.relative_to(root)): json.loads(path.read_text())["files"] for path in paths}


def test_a_first_run_computes_every_stage(first_run: tuple[PipelineConfig, list[dict[str, Any]]]) -> None:
    outcomes = first_run[1]
    assert {outcome["outcome"] for outcome in outcomes} == {"computed"}
    assert computed(outcomes) == {"subject", "tokens", "activations", "sae", "evaluation", "statistics", "report"}


def test_every_artefact_is_there_with_the_recorded_bytes(finished: PipelineConfig) -> None:
    storage = Storage(finished.execution.root)
    for spec in make_plan(finished).specs():
        assert verify(storage, require_record(storage, spec.ref)) == []


def test_a_second_run_computes_nothing(copy: PipelineConfig) -> None:
    before = contents(copy)
    assert computed(run(copy)) == set()
    assert contents(copy) == before


def test_the_second_run_s_tasks_are_cached_states_in_prefect(copy: PipelineConfig) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName

    # A title of its own: its task's name, which holds the fingerprint, belongs to this test alone.
    config = with_settings(copy, {"report": {"title": "Shown as Cached"}})
    run(config)
    run(config)
    name = f"render-report-{make_plan(config).report.fingerprint}"
    states: list[str | None] = []
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 30  # the server keeps its history a little behind
        while len(states) < 2 and time.monotonic() < deadline:
            runs = client.read_task_runs(task_run_filter=TaskRunFilter(name=TaskRunFilterName(any_=[name])))
            states = [task_run.state_name for task_run in runs if task_run.state and task_run.state.is_final()]
            time.sleep(0.2)
    assert sorted(map(str, states)) == ["Cached", "Completed"]


def test_another_k_trains_again_and_extracts_nothing(copy: PipelineConfig) -> None:
    saes = [{"sae": {"architecture": "topk", "d_sae": 64, "k": 6, "k_aux": 8}, "batch_rows": 128}]
    assert computed(run(with_settings(copy, {"saes": saes}))) == {"sae", "evaluation", "statistics", "report"}


def test_another_report_option_renders_and_nothing_else(copy: PipelineConfig) -> None:
    assert computed(run(with_settings(copy, {"report": {"title": "Another title"}}))) == {"report"}


def test_refresh_computes_the_stage_and_what_follows_to_the_same_bytes(copy: PipelineConfig) -> None:
    before = contents(copy)
    outcomes = run(copy, refresh="sae")
    assert computed(outcomes) == {"sae", "evaluation", "statistics", "report"}
    assert contents(copy) == before


def test_a_fresh_root_gives_the_same_bytes(finished: PipelineConfig, tmp_path: Path) -> None:
    execution = finished.execution.model_dump(mode="json") | {"root": str(tmp_path / "other")}
    again = with_settings(finished, {"execution": execution})
    run(again)
    ours, theirs = (recorded_files(config.execution.root) for config in (again, finished))
    assert len(ours) > 20
    assert ours == theirs


def test_only_one_stage_runs_when_one_is_asked_for(copy: PipelineConfig) -> None:
    outcomes = run(copy, only="report", refresh="report")
    assert {outcome["stage"] for outcome in outcomes} == {"report"}
    assert computed(outcomes) == {"report"}


def test_a_stage_without_its_inputs_says_what_is_missing(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(StoreError, match="never finished"):
        run(tiny_config(tmp_path / "empty", corpus), only="sae")


def test_a_deleted_record_is_computed_again_and_nothing_downstream(copy: PipelineConfig) -> None:
    storage, before = Storage(copy.execution.root), contents(copy)
    ref = make_plan(copy).saes[0].ref
    storage.remove(f"{ref}/record.json")
    assert computed(run(copy)) == {"sae"}
    assert contents(copy) == before


def test_deleting_prefect_s_results_computes_nothing(copy: PipelineConfig) -> None:
    from prefect.settings import get_current_settings

    run(copy)
    shutil.rmtree(get_current_settings().results.local_storage_path)
    assert computed(run(copy)) == set()


def test_several_hook_points_and_a_sweep_share_extraction_and_reads(tmp_path: Path, corpus: Path) -> None:
    topk = {"sae": {"architecture": "topk", "d_sae": 64, "k": 4, "k_aux": 8}, "batch_rows": 128}
    standard = {"sae": {"architecture": "standard", "d_sae": 32, "l1_coefficient": 0.1}, "batch_rows": 128}
    act, residual = "gpt_neox.layers.0.mlp.act", "gpt_neox.layers.0:input"
    config = tiny_config(
        tmp_path / "root",
        corpus,
        activations={"hook_points": [act, residual], "n_tokens": 2000, "part_bytes": 32768, "row_group_bytes": 8192},
        saes=[topk | {"hook_point": act}, standard | {"hook_point": act}, topk | {"hook_point": residual}],
        evaluation={"n_contexts": 16, "n_bootstrap": 0, "untrained": None},
    )
    outcomes = run(config)
    trainings = {tuple(o["ref"] for o in outcomes if o["task"] == "train_sae")}
    assert len(*trainings) == 3
    storage = Storage(config.execution.root)
    report = require_record(storage, make_plan(config).report.ref)
    assert report.metrics["n_saes"] == 3


def test_the_run_says_how_many_rows_were_left_out_and_why(
    copy: PipelineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.extract import extract

    with caplog.at_level("INFO", logger="flows.run"):
        extract(copy)
    (line,) = {m for m in caplog.messages if m.startswith("activations") and "untrained" not in m}
    snapshot = make_plan(copy).snapshots[copy.hook_points[0], "train"].ref
    metrics = require_record(Storage(copy.execution.root), snapshot).metrics
    n_rows, n_parts, n_special = (metrics[name] for name in ("n_rows", "n_parts", "n_special"))
    assert n_special > 0
    assert f"train: {n_rows:,} x 32, parts: {n_parts}, left out: special {n_special:,};" in line


@pytest.mark.slow
def test_an_appended_segment_leaves_the_old_artefacts_alone(copy: PipelineConfig, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "new.txt").write_text("alpha beta gamma delta return import value\n" * 60)
    (tmp_path / "more" / "other.txt").write_text("self None True class def alpha beta gamma\n" * 60)
    corpus = copy.model_dump(mode="json")["corpus"]
    corpus["segments"].append({"kind": "text", "urls": [f"{tmp_path}/more/*.txt"]})
    activations = copy.model_dump(mode="json")["activations"] | {"n_tokens": None}
    whole = with_settings(copy, {"activations": activations})
    run(whole)
    outcomes = run(with_settings(whole, {"corpus": corpus}))
    assert "subject" not in computed(outcomes)
    parts = parts_by_outcome(outcomes)
    assert parts["cached"] > parts["computed"] > 0


def test_appending_a_tenth_to_a_corpus_computes_a_tenth_of_the_parts(tmp_path: Path) -> None:
    from flows.extract import extract

    write_corpus(tmp_path / "old", 40)
    write_corpus(tmp_path / "all", 44)
    (tmp_path / "new").mkdir()
    for path in sorted((tmp_path / "all").iterdir())[40:]:
        path.rename(tmp_path / "new" / path.name)
    config = tiny_config(
        tmp_path / "root",
        tmp_path / "old",
        activations={
            "n_tokens": None,
            "batch_contexts": 16,
            "part_bytes": 16 * 16 * 64,
            "row_group_bytes": 4 * 16 * 64,
        },
    )
    extract(config)
    storage = Storage(config.execution.root)
    before = {name: storage.read_bytes(f"parts/{name}") for name in storage.sizes("parts")}
    corpus = config.model_dump(mode="json")["corpus"]
    corpus["segments"].append({"kind": "text", "urls": [f"{tmp_path}/new/*.txt"]})
    longer = with_settings(config, {"corpus": corpus})
    outcomes = extract(longer)
    parts = parts_by_outcome(outcomes)
    assert parts["computed"] > 1
    assert 0.05 < parts["computed"] / parts.total() < 0.15
    # The old parts keep their names and bytes, and come first in the snapshot, in their order.
    assert {name: storage.read_bytes(f"parts/{name}") for name in before} == before
    for place, spec in make_plan(config).snapshots.items():
        old = read_snapshot(storage, spec.ref)
        new = read_snapshot(storage, make_plan(longer).snapshots[place].ref)
        assert len(new.parts) > len(old.parts) or place[1] == "heldout"
        assert [part.path for part in new.parts[: len(old.parts)]] == [part.path for part in old.parts]


def test_parts_in_groups_are_extracted_skipped_and_repaired_by_themselves(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.extract import extract

    monkeypatch.setattr(part_sets, "MAX_GROUPS", 3)
    config = tiny_config(
        tmp_path / "root",
        corpus,
        activations={"n_tokens": None, "batch_contexts": 16, "part_bytes": 16 * 16 * 64, "row_group_bytes": 4096},
    )

    def extracted(repair: tuple[str, ...] = ()) -> dict[tuple[str, int, int], str]:
        outcomes = [o for o in extract(config, repair=repair) if o["task"] == "extract_parts"]
        return {(o["ref"], o["part"], o["n_parts"]): o["outcome"] for o in outcomes}

    plan = make_plan(config)
    storage, spec = Storage(config.execution.root), plan.parts[config.hook_points[0], "train"][0]
    first = extracted()
    n_parts = int(require_record(storage, spec.ref).metrics["n_parts"])
    groups = {(part, size) for ref, part, size in first if ref == spec.ref}
    assert len(groups) == 3
    assert sum(size for _, size in groups) == n_parts > 6
    assert set(first.values()) == {"computed"}
    assert set(extracted().values()) == {"cached"}

    stamps = {name: Path(storage.full(f"{spec.ref}/{name}")).stat().st_mtime_ns for name in storage.sizes(spec.ref)}
    missing = require_record(storage, spec.ref, 1)
    storage.remove(missing.path("part.parquet"))
    again = extracted()
    assert {key for key, outcome in again.items() if outcome == "computed"} == {
        min(k for k in again if k[0] == spec.ref)
    }
    new = {name: Path(storage.full(f"{spec.ref}/{name}")).stat().st_mtime_ns for name in storage.sizes(spec.ref)}
    assert {name for name in new if new[name] != stamps[name]} <= {
        missing.path("part.parquet").removeprefix(f"{spec.ref}/")
    }
    assert verify(storage, missing) == []

    repaired = extracted(repair=(f"{spec.ref}/part-00001",))
    assert {key for key, outcome in repaired.items() if outcome == "computed"} == {(spec.ref, 1, 1)}


def test_activations_from_a_file_go_from_rows_to_a_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((12, 6))
    active = rng.random((3000, 12)) < 0.1
    np.save(tmp_path / "act.npy", ((active * rng.random((3000, 12))) @ directions).astype(np.float32))
    config = PipelineConfig.model_validate(
        {
            "activations": {
                "kind": "given",
                "sets": {"mine": {"kind": "file", "url": str(tmp_path / "act.npy")}},
                "heldout_fraction": 0.1,
                "part_bytes": 24_000,
                "row_group_bytes": 4_800,
            },
            "saes": [{"sae": {"architecture": "topk", "d_sae": 24, "k": 3, "k_aux": 4}, "batch_rows": 100}],
            "execution": {"root": str(tmp_path / "root")},
        }
    )
    run(config)
    storage, plan = Storage(config.execution.root), make_plan(config)
    train = require_record(storage, plan.snapshots["mine", "train"].ref).metrics
    evaluation = require_record(storage, plan.evaluations[0].ref).metrics
    assert (train["n_rows"], evaluation["n_rows"], evaluation["split"]) == (2700, 300, "heldout")
    assert train["n_parts"] == 3
    assert evaluation["fvu"] < 0.9
    assert storage.exists(require_record(storage, plan.report.ref).path("index.html"))


def test_bad_input_stops_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere"):
        run(tiny_config(tmp_path / "root", tmp_path / "nowhere"))
    assert not (tmp_path / "root" / "tokens").exists()


def test_show_says_what_an_artefact_is_and_where_it_comes_from(finished: PipelineConfig) -> None:
    storage, plan = Storage(finished.execution.root), make_plan(finished)
    text = show(storage.uri(plan.report.ref), check=True)
    assert text.startswith("report: SAE report")
    for expected in (plan.saes[0].ref, plan.subject.ref, plan.segments[0][1].ref, "every file has its recorded hash"):
        assert expected in text
    inside = storage.uri(require_record(storage, plan.report.ref).path("index.html"))
    assert show(inside, check=False).splitlines()[0] == text.splitlines()[0]
