"""`execution.device` on its way from the configuration to what computes."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows.cli import main
from flows.run import Run
from sae.pipeline_config import ExecutionConfig, RayRequest
from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tasks.extract import commit_snapshot
from tests.flows.conftest import tiny_config, with_settings

COMPUTING = {
    "train_embedded_lm",
    "extract_group",
    "train_saes",
    "evaluate_sae",
    "statistics_of_part",
    "merge_statistics",
}


def test_everything_that_computes_is_told_the_device_of_the_configuration(
    first_run: tuple[PipelineConfig, Any], first_calls: list[tuple[Callable[..., Any], dict[str, Any]]]
) -> None:
    assert first_run[0].execution.device == "auto"
    assert {options["device"] for _, options in first_calls} == {"auto"}
    takes_one = {f.__name__ for f, _ in first_calls if "device" in inspect.signature(f).parameters}
    assert takes_one == COMPUTING


@pytest.mark.without_gpu
def test_a_gpu_that_is_not_there_ends_every_flow_before_it_begins(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody listens there, and nobody has to
    file, root = tmp_path / "config.json", tmp_path / "root"
    file.write_text(tiny_config(root, corpus).model_dump_json())
    for command in ("run", "plan"):
        assert main([command, str(file), "--set", "execution.device=cuda"]) == 2
        assert "execution.device: cuda is wanted, and no GPU can be used on" in capsys.readouterr().err
    execution = ExecutionConfig(root=str(root), device="cuda")
    with pytest.raises(Exception, match=r"execution\.device: cuda is wanted"), Run(execution, None, None, (), []):
        pass
    assert not root.exists()


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "given"),
    [
        ("auto", 0, "cpu"),
        ("auto", 0.5, "auto"),
        ("cuda", 1, "cuda"),
        ("cpu", 1, "cpu"),
    ],
)
def test_a_task_on_a_cluster_computes_on_a_gpu_where_its_stage_asks_for_one(
    wanted: str, num_gpus: float, given: str, finished: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_settings(finished, {"execution": {"root": finished.execution.root, "device": wanted}})
    submitted: list[dict[str, Any]] = []
    run = Run(config.execution, None, None, (), [])
    run._cluster = SimpleNamespace(  # type: ignore[assignment]
        request=lambda stage: RayRequest(num_gpus=num_gpus),
        submit=lambda task, parameters, stage: submitted.append(parameters),
    )
    run.submit("activations", commit_snapshot, [next(iter(make_plan(config).snapshots.values()))])
    assert submitted[0]["job"].device == given


def test_the_processes_of_a_mesh_are_told_too(tmp_path: Path) -> None:
    execution = ExecutionConfig.model_validate({"root": str(tmp_path), "mesh": {"latents": 2}, "device": "cpu"})
    gang = Run(execution, None, None, (), []).gang("sae")
    assert gang is not None
    assert gang.device == "cpu"


@pytest.mark.gpu
@pytest.mark.usefixtures("prefect_backend")
def test_a_pipeline_on_a_gpu_ends_like_one_on_the_cpu(tmp_path: Path, corpus: Path) -> None:
    from flows.pipeline import pipeline

    figures = {}
    for device in ("cpu", "cuda"):
        config = tiny_config(tmp_path / device, corpus)
        config = with_settings(config, {"execution": {"root": str(tmp_path / device), "device": device}})
        pipeline(config)
        storage, plan = Storage(config.execution.root), make_plan(config)
        on_gpu = [*plan.saes, *plan.evaluations, *plan.statistics]
        machines = {require_record(storage, spec.ref).produced.machine for spec in on_gpu}
        assert all((torch.cuda.get_device_name(0) in machine) == (device == "cuda") for machine in machines)
        figures[device] = require_record(storage, plan.evaluations[0].ref).metrics
    assert figures["cuda"]["fvu"] == pytest.approx(figures["cpu"]["fvu"], rel=0.1)
    assert figures["cuda"]["ce_clean"] == pytest.approx(figures["cpu"]["ce_clean"], rel=0.01)
