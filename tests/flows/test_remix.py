"""The remix under Prefect: what is computed, read by whom, and what is left when it is done."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.errors import ConfigError
from sae.extract.config import DealtPartsSpec, RemixSpec
from sae.extract.remix import dealt_snapshot
from sae.plan import PipelineConfig, make_plan
from sae.preflight import check_plan
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tests.flows.conftest import tiny_config, with_settings
from tests.flows.processes import CommandLine, strays
from tests.processes import wait_for

pytestmark = pytest.mark.usefixtures("prefect_backend")

N_PARTS = 24


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, prefect_backend: None) -> PipelineConfig:
    """Given activations in many small parts, extracted and mixed into fewer; tests copy its root to change it."""
    folder = tmp_path_factory.mktemp("mixed")
    path = folder / "act.npy"
    np.save(path, np.random.default_rng(0).standard_normal((N_PARTS * 20, 4), np.float32))
    config = PipelineConfig.model_validate(
        {
            "activations": {
                "kind": "given",
                "sets": {"mine": {"kind": "file", "url": str(path)}},
                "part_bytes": 20 * 16,
                "row_group_bytes": 8 * 16,
                "remix": {"part_bytes": 50 * 16},
            },
            "saes": [{"sae": {"architecture": "topk", "d_sae": 8, "k": 2, "k_aux": 2}, "batch_rows": 40}],
            "execution": {"root": str(folder / "root"), "retry_delay_seconds": 0, "max_workers": 1},
        }
    )
    extracted(config)
    return config


@pytest.fixture
def given_config(mixed: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """The same on a root that is not there."""
    return with_root(mixed, str(tmp_path / "root"))


@pytest.fixture
def copy_of_mixed(mixed: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """The finished extraction on a root of its own."""
    shutil.copytree(mixed.execution.root, tmp_path / "root")
    return with_root(mixed, str(tmp_path / "root"))


def with_root(config: PipelineConfig, root: str, **execution: Any) -> PipelineConfig:
    return with_settings(config, {"execution": config.execution.model_dump(mode="json") | {"root": root} | execution})


def extracted(config: PipelineConfig, **options: Any) -> list[dict[str, Any]]:
    from flows.extract import extract

    return extract(config, **options)


def mixed_parts(config: PipelineConfig) -> list[str]:
    """Content of every part of the remix, its record and its snapshot."""
    storage = Storage(config.execution.root)
    remix, snapshot = make_plan(config).remixed["mine"]
    n_parts = require_record(storage, remix.ref).metrics["n_parts"]
    records = [require_record(storage, remix.ref, part) for part in range(n_parts)]
    return [record.content for record in (*records, require_record(storage, snapshot.ref))]


def remix_of(config: PipelineConfig) -> RemixSpec:
    return make_plan(config).remixed["mine"][0]


def remixed(config: PipelineConfig, **options: Any) -> PipelineConfig:
    activations = config.activations.model_dump(mode="json") | {"remix": {"part_bytes": 48 * 16 * 64} | options}
    return with_settings(config, {"activations": activations})


def run(config: PipelineConfig, **options: Any) -> list[dict[str, Any]]:
    from flows.pipeline import pipeline

    return pipeline(config, **options)


def computed(outcomes: list[dict[str, Any]]) -> set[str]:
    return {outcome["task"] for outcome in outcomes if outcome["outcome"] == "computed"}


def test_without_a_remix_every_name_is_what_it_was(tmp_path: Path, corpus: Path) -> None:
    plan = make_plan(tiny_config(tmp_path / "root", corpus))
    mixed = make_plan(remixed(tiny_config(tmp_path / "root", corpus)))
    assert plan.remixed == {}
    assert mixed.parts == plan.parts
    assert mixed.snapshots == plan.snapshots
    assert mixed.saes != plan.saes
    (spec,) = plan.saes
    assert spec.snapshot == plan.snapshots[spec.config.hook_point, "train"].ref


@pytest.mark.slow
def test_training_alone_reads_the_remix(copy: PipelineConfig) -> None:
    config = remixed(copy)
    tasks = computed(run(config))
    assert {"deal_part", "finish_dealing", "gather_part", "finish_remix", "commit_snapshot", "train_sae"} <= tasks
    assert not tasks & {"extract_part", "tokenize_segment", "train_subject"}
    storage, plan = Storage(config.execution.root), make_plan(config)
    for each in (plan, plan.control):
        assert each
        ((hook_point, (remix, snapshot)),) = each.remixed.items()
        original = each.snapshots[hook_point, "train"]
        assert [spec.snapshot for spec in each.saes] == [snapshot.ref]
        assert [spec.train_snapshot for spec in each.evaluations] == [original.ref]
        assert all(spec.snapshots["train"] == original.ref for spec in each.statistics)
        ours, theirs = (require_record(storage, spec.ref).metrics for spec in (snapshot, original))
        assert ours["n_rows"] == theirs["n_rows"]
        assert ours["n_parts"] > 2
        assert ours["mean_sq_norm"] == pytest.approx(theirs["mean_sq_norm"])
        for ref in (DealtPartsSpec(remix=remix).ref, dealt_snapshot(remix).ref):
            assert storage.sizes(ref) == {}
            assert not Path(storage.full(ref)).exists()
    assert computed(run(config)) == set()


def test_the_number_of_workers_does_not_change_a_byte(mixed: PipelineConfig, given_config: PipelineConfig) -> None:
    config = with_root(given_config, given_config.execution.root, max_workers=3)
    extracted(config)
    assert mixed_parts(config) == mixed_parts(mixed)
    assert len(mixed_parts(mixed)) == 11


@pytest.mark.slow
def test_a_remix_on_s3_has_the_bytes_of_one_on_disk(mixed: PipelineConfig, s3_root: str) -> None:
    on_s3 = with_root(mixed, s3_root, max_workers=2)
    extracted(on_s3)
    assert mixed_parts(on_s3) == mixed_parts(mixed)
    assert Storage(s3_root).sizes(DealtPartsSpec(remix=remix_of(on_s3)).ref) == {}


@pytest.mark.slow
@pytest.mark.parametrize("half", ["deal", "gather"])
def test_a_run_killed_halfway_does_the_rest_when_it_is_started_again(
    half: str, mixed: PipelineConfig, given_config: PipelineConfig, tmp_path: Path, shared_server: dict[str, Any]
) -> None:
    root, remix = Path(given_config.execution.root), remix_of(given_config)
    ref, n_parts = (DealtPartsSpec(remix=remix).ref, N_PARTS) if half == "deal" else (remix.ref, 10)

    def n_done() -> int:
        return len(list(root.glob(f"{ref}/part-*.json")))

    first = CommandLine(given_config, tmp_path, "--only", "activations", **shared_server)
    wait_for(lambda: n_done() >= n_parts // 2 or first.process.poll() is not None, 120)
    first.kill(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    wait_for(lambda: not first.alive(), 15)
    n_left = n_parts - n_done()
    assert 0 < n_left <= n_parts // 2
    code, result, err = CommandLine(given_config, tmp_path, "--only", "activations", **shared_server).finish()
    assert code == 0, err
    again = [task for task in result["tasks"] if task["task"] == f"{half}_part" and task["outcome"] == "computed"]
    assert len(again) == n_left
    assert mixed_parts(given_config) == mixed_parts(mixed)
    assert strays(str(root)) == []
    assert not (root / DealtPartsSpec(remix=remix).ref).exists()


def test_a_lost_part_is_mixed_again_to_the_same_bytes(copy_of_mixed: PipelineConfig) -> None:
    before, storage, remix = mixed_parts(copy_of_mixed), Storage(copy_of_mixed.execution.root), remix_of(copy_of_mixed)
    storage.remove(require_record(storage, remix.ref, 3).path("part.parquet"))
    outcomes = extracted(copy_of_mixed)
    assert [o["part"] for o in outcomes if o["task"] == "gather_part" and o["outcome"] == "computed"] == [3]
    assert mixed_parts(copy_of_mixed) == before
    assert strays(copy_of_mixed.execution.root) == []
    assert computed(extracted(copy_of_mixed)) == set()
    assert computed(extracted(copy_of_mixed, refresh="activations")) >= {"deal_part", "gather_part", "finish_remix"}
    assert mixed_parts(copy_of_mixed) == before


def test_a_run_that_was_killed_between_commit_and_tidying_up_is_tidied_up_after(
    given_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("flows.remix.remove_dealt", lambda storage, spec: None)
        extracted(given_config)
    folder = Path(given_config.execution.root) / DealtPartsSpec(remix=remix_of(given_config)).ref
    assert folder.exists()
    assert computed(extracted(given_config)) == set()
    assert not folder.exists()


@pytest.mark.slow
def test_a_run_that_another_one_overtakes_ends_as_if_alone(
    given_config: PipelineConfig, tmp_path: Path, shared_server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one does all the work, and deletes the dealt parts, when this one has dealt half of them."""
    from flows.run import Run

    fan_out, other = Run.fan_out, []

    def overtaken(self: Run, stage: Any, title: str, task: Any, jobs: Any, *args: Any, **parameters: Any) -> None:
        half = len(jobs) // 2 if title.endswith("deal") else 0
        if half:
            fan_out(self, stage, title, task, jobs[:half], *args, **parameters)
            other.append(CommandLine(given_config, tmp_path, "--only", "activations", **shared_server).finish())
        fan_out(self, stage, title, task, jobs[half:], *args, **parameters)

    monkeypatch.setattr(Run, "fan_out", overtaken)
    outcomes = extracted(given_config)
    ((code, result, err),) = other
    assert code == 0, err
    assert {task["outcome"] for task in result["tasks"] if task["task"] == "gather_part"} == {"computed"}
    assert not [o for o in outcomes if o["task"] == "gather_part"]  # there was nothing to gather from
    assert len(mixed_parts(given_config)) == 11
    assert strays(given_config.execution.root) == []
    assert not (Path(given_config.execution.root) / DealtPartsSpec(remix=remix_of(given_config)).ref).exists()


def test_room_for_the_copies_is_looked_for_before_anything_runs(
    given_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(config: PipelineConfig) -> float:
        monkeypatch.setattr(Storage, "free_bytes", lambda self: 1)
        with pytest.raises(ConfigError, match=r"has 1 bytes free, the run needs about") as caught:
            check_plan(make_plan(config))
        monkeypatch.undo()
        return float(re.search(r"about ([\d.]+) kB", str(caught.value))[1])

    activations = given_config.activations.model_dump(mode="json")
    rows = N_PARTS * 20 * (16 + 12) / 1000
    alone = needed(with_settings(given_config, {"activations": activations | {"remix": None}}))
    assert needed(given_config) == pytest.approx(alone + 2 * rows, rel=0.05)
    extracted(with_settings(given_config, {"activations": activations | {"remix": None}}))
    source = make_plan(given_config).snapshots["mine", "train"].ref
    n_bytes = require_record(Storage(given_config.execution.root), source).metrics["n_bytes"]  # mostly alignment
    assert needed(given_config) == pytest.approx(2 * n_bytes / 1000, rel=0.05)
