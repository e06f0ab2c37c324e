"""The deployments under a real server and worker: runs, refused parameters, a schedule, a killed worker, the UI."""

import contextlib
import json
import os
import re
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.recipes import default
from sae.plan import PipelineConfig, make_plan
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from tests.deployments.conftest import PROJECT, Prefect, recorded_files, wait_for

FLOWS = ("pipeline", "extract", "train", "report")


class Runs(NamedTuple):
    """Runs of the pipeline deployment with one config, in order, by their ids."""

    killed: Any
    """Its process and the worker were killed in the middle."""
    completed: Any
    """Triggered again under a new worker."""
    scheduled: Any
    """Fired by a schedule."""


@pytest.fixture(scope="module")
def runs(prefect: Prefect, tiny: PipelineConfig, uninterrupted: subprocess.Popen[Any]) -> Runs:
    killed = prefect.trigger("pipeline/default", tiny)
    root = Path(tiny.execution.root)
    wait_for(lambda: [*root.glob("tokens/*/record.json")], 120, "the run has its tokens", prefect.log)
    mine = prefect.processes(killed)
    assert mine
    prefect.kill_worker()
    for pid in mine:
        with contextlib.suppress(ProcessLookupError):  # a child dies with its parent
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not prefect.processes(killed), 10, "nothing of the killed run is left")
    prefect.start_worker()
    completed = prefect.trigger("pipeline/default", tiny)
    prefect.wait_until_final(completed)
    return Runs(killed, completed, _fire_by_schedule(prefect, tiny))


@pytest.fixture(scope="module")
def uninterrupted(prefect: Prefect, tiny: PipelineConfig) -> subprocess.Popen[Any]:
    """The same config on another root by the command line, in the background."""
    (prefect.folder / "config.json").write_text(tiny.model_dump_json())
    command = ("flows.cli", "run", "config.json", "--root", "other", "--json")
    return prefect.start("uninterrupted", *command)


@pytest.fixture(scope="module")
def expected(prefect: Prefect, uninterrupted: subprocess.Popen[Any]) -> dict[str, Any]:
    """What the uninterrupted run says of itself."""
    return dict(json.loads(prefect.finish("uninterrupted", uninterrupted).splitlines()[-1]))


def _fire_by_schedule(prefect: Prefect, config: PipelineConfig) -> Any:
    """Add a short schedule to the deployment, wait for its first run to end, remove it. Returns: the run's id."""
    from prefect.client.schemas.schedules import IntervalSchedule

    with prefect.client() as client:
        deployment = client.read_deployment_by_name("pipeline/default")
        every = IntervalSchedule(interval=timedelta(seconds=5))
        parameters = {"config": config.model_dump(mode="json")}
        (schedule,) = client.create_deployment_schedules(deployment.id, [(every, True)], parameters=parameters)

        def fired() -> Any:
            runs = [run for run in client.read_flow_runs() if run.auto_scheduled and run.state.name != "Scheduled"]
            return runs[0].id if runs else None

        first = wait_for(fired, 90, "the schedule fires", lambda: prefect.log("server"))
        client.delete_deployment_schedule(deployment.id, schedule.id)
    prefect.wait_until_final(first)
    return first


def test_every_flow_is_deployed_from_its_module_with_the_default_recipe(prefect: Prefect) -> None:
    with prefect.client() as client:
        deployments = {name: client.read_deployment_by_name(f"{name}/default") for name in FLOWS}
    for name, deployment in deployments.items():
        assert deployment.entrypoint == f"flows.{name}.{name}"
        assert deployment.enforce_parameter_schema
        assert deployment.work_pool_name == "sae-pipeline"
        assert PipelineConfig.model_validate_json(json.dumps(deployment.parameters["config"])) == default()
        assert str(PROJECT) not in deployment.model_dump_json()
    (nightly,) = deployments["pipeline"].schedules
    assert (nightly.slug, nightly.active) == ("nightly", False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": "x"}, "config.seed"),
        ({"sead": 1}, "'sead' was unexpected"),
        ({"execution": {"max_workers": 0}}, "config.execution.max_workers"),
        ({"saes": []}, "config.saes"),
        ({"saes": [{"sae": {"architecture": "nonsense"}}]}, r"config.saes[0].sae"),
    ],
)
def test_a_bad_parameter_is_refused_when_the_run_is_created(
    prefect: Prefect, tiny: PipelineConfig, changes: dict[str, Any], complaint: str
) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    with prefect.client() as client:
        deployment = client.read_deployment_by_name("pipeline/default")
        before = len(client.read_flow_runs())
        parameters = {"config": tiny.model_dump(mode="json") | changes}
        with pytest.raises(PrefectHTTPStatusError, match=re.escape(complaint)) as refused:
            client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        assert refused.value.response.status_code == 409
        assert len(client.read_flow_runs()) == before


def test_a_stage_that_does_not_exist_is_refused(prefect: Prefect, tiny: PipelineConfig) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    with pytest.raises(PrefectHTTPStatusError, match="only"):
        prefect.trigger("pipeline/default", tiny, only="nonsense")


def test_a_run_after_a_killed_worker_completes_from_the_store(
    prefect: Prefect, expected: dict[str, Any], runs: Runs
) -> None:
    state = prefect.wait_until_final(runs.completed)
    assert state.name == "Completed", state.message
    states = prefect.task_states(runs.completed, len(expected["tasks"]))
    assert states.keys() == {"Completed", "Cached"}
    assert states["Cached"] >= 3  # segment, tokenizer and tokens were there when the worker was killed


def test_its_artefacts_are_those_of_an_uninterrupted_run(
    prefect: Prefect, tiny: PipelineConfig, expected: dict[str, Any], runs: Runs
) -> None:
    storage = Storage(tiny.execution.root)
    assert all(read_record(storage, spec.ref) for spec in make_plan(tiny).specs())
    ours, theirs = recorded_files(tiny.execution.root), recorded_files(str(prefect.folder / "other"))
    assert len(ours) > 20
    assert ours == theirs


def test_a_schedule_fires_by_itself_and_finds_everything_in_the_store(
    prefect: Prefect, expected: dict[str, Any], runs: Runs
) -> None:
    state = prefect.wait_until_final(runs.scheduled)
    assert state.name == "Completed", state.message
    n_tasks = len(expected["tasks"])
    assert prefect.task_states(runs.scheduled, n_tasks) == {"Cached": n_tasks}


def test_what_the_schema_cannot_see_fails_before_any_work(prefect: Prefect, tiny: PipelineConfig, runs: Runs) -> None:
    """`k` larger than `d_sae` is found when the run starts; one run with one message, and no artefact."""
    config = tiny.model_dump(mode="json")
    config["saes"][0]["sae"]["k"] = 65
    config["execution"]["root"] = str(prefect.folder / "never")
    with prefect.client() as client:
        deployment = client.read_deployment_by_name("pipeline/default")
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"config": config})
    state = prefect.wait_until_final(run.id)
    assert state.name == "Failed"
    assert "k = 65 is larger than d_sae = 64" in state.message
    assert not (prefect.folder / "never").exists()


def test_nothing_is_pickled(prefect: Prefect, runs: Runs) -> None:
    """Neither results nor the errors of failed runs."""
    for folder in (prefect.home / "storage", prefect.folder / "root" / ".prefect"):
        for path in folder.rglob("*"):
            if path.is_file():
                text = path.read_text()
                json.loads(text)
                assert '"type":"pickle"' not in text


@pytest.mark.browser
def test_the_ui_shows_the_flow_graph(prefect: Prefect, runs: Runs, page: Any) -> None:
    with page.expect_response(lambda answer: "graph-v2" in answer.url) as answered:
        page.goto(f"{prefect.url}/v2/runs/flow-run/{runs.completed}")
    graph = answered.value.json()
    assert [node["label"].partition(" / ")[0] for _, node in graph["nodes"]] == ["extract", "train", "report"]
    page.locator("canvas").first.wait_for()
    page.get_by_role("tab", name="Subflow Runs").click()
    page.get_by_text("3 Subflow runs").wait_for()
    look(prefect, page, "graph")


@pytest.mark.browser
def test_the_ui_shows_completed_tasks_first_and_cached_ones_then(prefect: Prefect, runs: Runs, page: Any) -> None:
    for run, state in ((runs.completed, "Completed"), (runs.scheduled, "Cached")):
        page.goto(f"{prefect.url}/v2/runs/flow-run/{prefect.subflows(run)['train']}?tab=TaskRuns")
        page.get_by_text(re.compile("^train-sae-")).first.wait_for()
        states = page.get_by_role("main").get_by_text(re.compile("^(Completed|Cached)$")).all_inner_texts()
        assert states[1:] == [state, state]  # after the flow run's own
        look(prefect, page, f"tasks-{state}")


@pytest.mark.browser
def test_the_ui_shows_headline_and_report_among_the_artifacts(prefect: Prefect, runs: Runs, page: Any) -> None:
    for run in (runs.completed, prefect.subflows(runs.completed)["report"]):
        page.goto(f"{prefect.url}/v2/runs/flow-run/{run}?tab=Artifacts")
        for key in ("sae-headline", "sae-metrics", "sae-plot", "sae-report"):
            page.get_by_text(key, exact=True).wait_for()
        look(prefect, page, "artifacts")
    page.get_by_text("sae-plot", exact=True).click()
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    page.wait_for_function("[...document.images].some(i => i.src.startsWith('data:') && i.naturalWidth > 300)")
    look(prefect, page, "plot")
    page.goto(f"{prefect.url}/v2/runs/flow-run/{prefect.subflows(runs.completed)['report']}?tab=Artifacts")
    page.get_by_text("sae-headline", exact=True).click()  # its history
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    page.get_by_role("cell", name="fvu", exact=True).wait_for()
    page.get_by_role("columnheader", name="topk-64-k4").wait_for()
    look(prefect, page, "headline")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("value", "complaint"),
    [("1.5", "1.5 is not of type 'integer'"), ("0", "0 is less than or equal to the minimum of 0")],
)
def test_the_parameter_form_refuses_a_bad_value(
    prefect: Prefect, runs: Runs, page: Any, value: str, complaint: str
) -> None:
    with prefect.client() as client:
        deployment = client.read_deployment_by_name("pipeline/default")
        before = {run.id for run in client.read_flow_runs()}
        page.goto(f"{prefect.url}/v2/deployments/deployment/{deployment.id}/run")
        page.get_by_label(re.compile("^max.workers", re.IGNORECASE)).fill(value)
        page.get_by_role("button", name="Submit").click()
        page.get_by_text(complaint, exact=True).scroll_into_view_if_needed()
        look(prefect, page, f"refused-{value}")
        assert {run.id for run in client.read_flow_runs()} == before


@pytest.mark.slow
@pytest.mark.browser
def test_the_ui_shows_progress(prefect: Prefect, tiny: PipelineConfig, runs: Runs, page: Any) -> None:
    run = prefect.trigger("pipeline/default", _changed(tiny, prefect.folder / "long", n_steps=3000))
    prefect.wait_until_final(run)
    page.goto(f"{prefect.url}/v2/runs/flow-run/{prefect.subflows(run)['extract']}?tab=Artifacts")
    page.get_by_text("subject: training").wait_for()
    look(prefect, page, "progress")


@pytest.mark.slow
def test_a_run_whose_worker_alone_was_killed_ends_and_leaves_nothing(prefect: Prefect, tiny: PipelineConfig) -> None:
    """Its process outlives the worker until it next writes to the worker's pipe; then it ends as Crashed."""
    config = _changed(tiny, prefect.folder / "alone", n_steps=1500)
    run = prefect.trigger("pipeline/default", config)
    root = Path(config.execution.root)
    wait_for(lambda: [*root.glob("tokens/*/record.json")], 120, "the run has its tokens", prefect.log)
    prefect.kill_worker()
    assert prefect.wait_until_final(run).name == "Crashed"
    wait_for(lambda: not prefect.processes(run), 60, "the run's processes end")
    prefect.start_worker()
    again = prefect.trigger("pipeline/default", config)
    assert prefect.wait_until_final(again).name == "Completed"


@pytest.mark.slow
def test_a_worker_that_was_not_told_where_the_project_is_runs_nothing(prefect: Prefect, tiny: PipelineConfig) -> None:
    """Rather than write artefacts into a temporary folder that is removed after the run."""
    prefect.kill_worker()
    prefect.start_worker(SAE_PIPELINE_HOME="")
    run = prefect.trigger("pipeline/default", _changed(tiny, Path("runs"), n_steps=20))
    assert prefect.wait_until_final(run).name == "Crashed"
    assert "/deployments/.." in prefect.log()
    prefect.kill_worker()
    prefect.start_worker()


@pytest.mark.slow
def test_the_automation_marks_a_lost_run_as_crashed(prefect: Prefect, tiny: PipelineConfig) -> None:
    text = (PROJECT / "deployments" / "automations.yaml").read_text()
    quicker = prefect.folder / "automations.yaml"
    quicker.write_text(text.replace("within: 540", "within: 75"))
    prefect.run("automation", "prefect", "automation", "create", "--from-file", str(quicker))
    run = prefect.trigger("pipeline/default", _changed(tiny, prefect.folder / "lost", n_steps=1_000_000))
    wait_for(lambda: [*prefect.folder.glob("lost/tokens/*/record.json")], 120, "the run is busy", prefect.log)
    prefect.kill_worker()
    for pid in prefect.processes(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    state = prefect.wait_until_final(run)
    assert (state.name, state.message) == ("Crashed", "its heartbeat has stopped")


def look(prefect: Prefect, page: Any, name: str) -> None:
    """Keep a picture of the page for people."""
    page.screenshot(path=prefect.folder / f"{name}.png")


def _changed(config: PipelineConfig, root: Path, n_steps: int) -> PipelineConfig:
    """The config with another root and a longer training of the subject."""
    data = config.model_dump(mode="json")
    data["subject"]["n_steps"] = n_steps
    data["execution"]["root"] = str(root)
    return PipelineConfig.model_validate_json(json.dumps(data))
