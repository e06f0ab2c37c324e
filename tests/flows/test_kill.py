"""kill -9 and SIGTERM at random moments: the same command goes on and ends with the same bytes."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig
from tests.flows.conftest import tiny_config
from tests.flows.processes import CommandLine, contents, count_records, strays
from tests.processes import wait_for


def killable(root: Path, corpus: Path) -> PipelineConfig:
    """The tiny pipeline with training long enough to be killed in, and a checkpoint every few steps."""
    config = tiny_config(root, corpus).model_dump(mode="json")
    config["subject"]["n_steps"] = 120
    config["saes"][0]["n_tokens"] = 60_000
    config["execution"] |= {"checkpoint_every_steps": 7, "threads": 1}
    return PipelineConfig.model_validate(config)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path, prefect_backend: None) -> dict[str, str]:
    """The content of every artefact of a run that nobody killed."""
    from flows.pipeline import pipeline

    config = killable(tmp_path_factory.mktemp("uninterrupted") / "root", corpus)
    pipeline(config)
    return contents(config)


@pytest.fixture
def own_server(tmp_path: Path) -> dict[str, Any]:
    """An environment in which a run starts its own Prefect server on its own database."""
    return {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": None}


def kill_at_random(config: PipelineConfig, folder: Path, rng: random.Random, number: signal.Signals, **env: Any) -> str:
    """Start a run, kill it after a random number of further commits, so in any stage, on any machine.

    Returns: how it ended.
    """
    before = count_records(config.execution.root)
    target = rng.randint(before, before + 14)
    run = CommandLine(config, folder, **env)
    wait_for(lambda: count_records(config.execution.root) >= target or run.process.poll() is not None, 120)
    time.sleep(rng.uniform(0, 0.4))
    run.kill(number)
    code, _, err = run.finish()
    wait_for(lambda: not run.alive(), 15)  # no orphan
    if code == 0:
        return "finished"
    if number == signal.SIGTERM:
        assert code in (75, -signal.SIGTERM), err
        assert "Traceback" not in err, err
    return "killed"


def finish(config: PipelineConfig, folder: Path, expected: dict[str, str], **env: Any) -> None:
    run = CommandLine(config, folder, **env)
    code, _, err = run.finish()
    assert code == 0, err
    assert contents(config) == expected
    assert strays(config.execution.root) == []
    wait_for(lambda: not run.alive(), 15)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, corpus: Path, uninterrupted: dict[str, str], shared_server: dict[str, Any]
) -> None:
    config, rng = killable(tmp_path / "root", corpus), random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM):
        kill_at_random(config, tmp_path, rng, number, **shared_server)
    finish(config, tmp_path, uninterrupted, **shared_server)


@pytest.mark.slow
def test_a_run_that_loses_its_server_and_its_trainers_goes_on(
    tmp_path: Path, corpus: Path, uninterrupted: dict[str, str], own_server: dict[str, Any]
) -> None:
    config = killable(tmp_path / "root", corpus)
    root = Path(config.execution.root)
    run = CommandLine(config, tmp_path, **own_server)
    for stage in ("subjects", "saes"):
        wait_for(lambda stage=stage: any(root.glob(f"{stage}/*/checkpoints/*/*.json")), 120)
        for pid in run.children("tasks.worker"):
            os.kill(pid, signal.SIGKILL)
        if stage == "subjects":
            for pid in run.children("uvicorn"):
                os.kill(pid, signal.SIGKILL)
    code, result, err = run.finish()
    assert code == 0, err
    assert "starting it again" in err
    for task in ("train_subject", "train_sae"):  # retried by Prefect, and not from the start
        assert f"{task}: the worker process of" in err.replace("-", "_")
    assert err.count("it will be tried again") >= 2
    assert err.count("going on from the checkpoint of step") >= 2
    assert contents(config) == uninterrupted
    assert strays(config.execution.root) == []
    assert result["report"]
    wait_for(lambda: not run.alive(), 15)


@pytest.mark.slow
def test_a_successor_is_not_harmed_by_a_predecessor_that_wakes_up_later(
    tmp_path: Path, corpus: Path, uninterrupted: dict[str, str], shared_server: dict[str, Any]
) -> None:
    config = killable(tmp_path / "root", corpus)
    first = CommandLine(config, tmp_path, **shared_server)
    root = Path(config.execution.root)
    wait_for(lambda: any(root.glob("*/*/checkpoints/*/*.json")), 120)
    sleepers = [*first.children("tasks.worker"), first.process.pid]  # in the middle of training
    for pid in sleepers:
        os.kill(pid, signal.SIGSTOP)
    finish(config, tmp_path, uninterrupted, **shared_server)
    for pid in sleepers:
        os.kill(pid, signal.SIGCONT)  # it goes on with work that is done by now
    code, _, err = first.finish()
    assert code == 0, err
    assert contents(config) == uninterrupted
    assert strays(config.execution.root) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment(
    seed: int, tmp_path: Path, corpus: Path, uninterrupted: dict[str, str], own_server: dict[str, Any]
) -> None:
    config, rng = killable(tmp_path / "root", corpus), random.Random(seed)
    victim = ("run", "tasks.worker", "uvicorn", "terminated", "interrupted")[seed % 5]
    target = rng.randrange(len(uninterrupted))
    run = CommandLine(config, tmp_path, **own_server)
    wait_for(lambda: count_records(config.execution.root) >= target and run.children("uvicorn"), 240)
    time.sleep(rng.uniform(0, 1.0))
    signals = {"run": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
    if victim in signals:
        run.kill(signals[victim])
    else:
        for pid in run.children(victim):
            os.kill(pid, signal.SIGKILL)
    code, _, err = run.finish()
    assert code in {"run": (-9, 0), "terminated": (75, 0), "interrupted": (130, 0)}.get(victim, (0,)), err
    assert "Traceback" not in err, err
    wait_for(lambda: not run.alive(), 15)
    finish(config, tmp_path, uninterrupted, **own_server)
