"""Runs on a Ray cluster of this machine: the bytes of runs on threads, also after a Ray worker was killed; refusals.

`make test-ray` installs Ray and runs them.
"""

import contextlib
import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig
from tests.flows.conftest import tiny_config, with_settings
from tests.flows.processes import CommandLine, contents, count_records, strays
from tests.processes import is_alive, wait_for
from tests.ray_head import Head

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("prefect_ray") is None, reason="Ray is not installed: pip install 'sae-pipeline[ray]'"
    ),
]

SAES = [{"sae": {"architecture": "topk", "d_sae": 64, "k": k, "k_aux": 8}, "batch_rows": 128} for k in (4, 6)]
SECONDS = 1200
"""Of a run: Ray's processes take a while to start."""


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory: pytest.TempPathFactory, corpus: Path, prefect_backend: None) -> dict[str, str]:
    """The content of every artefact of a run without Ray."""
    from flows.pipeline import pipeline

    config = on_ray(tmp_path_factory.mktemp("threads") / "root", corpus, "local", runner="thread")
    pipeline(config)
    return contents(config)


def on_ray(root: Path, corpus: Path, address: str, **execution: Any) -> PipelineConfig:
    given = {"root": str(root), "threads": 1, "retry_delay_seconds": 0, "runner": "ray", "ray": {"address": address}}
    return with_settings(tiny_config(root, corpus), {"saes": SAES, "execution": given | execution})


def test_a_run_on_ray_gives_the_bytes_of_one_on_threads(
    tmp_path: Path, corpus: Path, on_threads: dict[str, str], shared_server: dict[str, Any]
) -> None:
    config = on_ray(tmp_path / "root", corpus, "local")
    (tmp_path / "home").mkdir()
    run = CommandLine(config, tmp_path, HOME=str(tmp_path / "home"), RAY_memory_monitor_refresh_ms="0", **shared_server)
    code, result, err = run.finish(SECONDS)
    assert code == 0, err
    assert contents(config) == on_threads
    assert {task["outcome"] for task in result["tasks"]} == {"computed"}
    assert strays(config.execution.root) == []
    wait_for(lambda: not run.alive(), 30)


def test_a_killed_ray_worker_costs_only_its_part(
    head: Head, tmp_path: Path, corpus: Path, on_threads: dict[str, str], shared_server: dict[str, Any]
) -> None:
    config = on_ray(tmp_path / "root", corpus, head.address)
    root = Path(config.execution.root)
    run = CommandLine(config, tmp_path, **head.environment, **shared_server)
    wait_for(lambda: len(list(root.glob("parts/*/part-*.json"))) >= 2 or run.process.poll() is not None, SECONDS)
    victims: list[int] = []

    def found() -> bool:
        victims[:] = [pid for pid in titled("ray::extract_parts") if is_alive(pid)]
        return bool(victims) or run.process.poll() is not None

    wait_for(found, SECONDS)
    os.kill(victims[0], signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in root.glob("parts/*/part-*.json")}
    code, _, err = run.finish(SECONDS)
    assert code == 0, err
    assert not is_alive(victims[0])
    assert contents(config) == on_threads
    assert {path: path.stat().st_mtime_ns for path in before} == before  # no other part was made again
    assert strays(config.execution.root) == []
    wait_for(lambda: not run.alive(), 30)


def titled(title: str) -> list[int]:
    """Processes that call themselves so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(folder.name))
    return found


def test_a_stopped_run_saves_its_training_and_leaves_nothing(
    head: Head, tmp_path: Path, corpus: Path, shared_server: dict[str, Any]
) -> None:
    config = on_ray(tmp_path / "root", corpus, head.address, checkpoint_every_steps=1_000_000)
    config = with_settings(config, {"saes": [SAES[0] | {"n_tokens": 100_000_000}]})
    root = Path(config.execution.root)
    run = CommandLine(config, tmp_path, **head.environment, **shared_server)
    wait_for(lambda: "sae: training: " in run.said() or run.process.poll() is not None, SECONDS)  # in its steps
    run.kill(signal.SIGTERM)
    code, _, err = run.finish(120)
    assert code == 75, err
    assert "Traceback" not in err
    assert list(root.glob("saes/*/checkpoints/*/*.json"))  # not one that was due
    wait_for(lambda: not run.alive() and not titled("ray::train_sae"), 60)


def test_an_sae_on_several_processes_has_the_bytes_of_torchruns(
    head: Head, tmp_path: Path, corpus: Path, shared_server: dict[str, Any]
) -> None:
    few = {"saes": SAES[:1], "evaluation": {"n_contexts": 16, "n_bootstrap": 20, "untrained": None}}
    configs = [
        with_settings(on_ray(tmp_path / name, corpus, head.address, runner=name, mesh={"latents": 2}), few)
        for name in ("thread", "ray")
    ]
    for config in configs:
        run = CommandLine(config, tmp_path, **head.environment, **shared_server)
        code, _, err = run.finish(SECONDS)
        assert code == 0, err
        assert strays(config.execution.root) == []
        wait_for(lambda run=run: not run.alive(), 30)
    by_torchrun, by_ray = map(contents, configs)
    assert by_ray == by_torchrun


def test_what_no_machine_has_is_refused_at_once(
    head: Head, tmp_path: Path, corpus: Path, shared_server: dict[str, Any]
) -> None:
    ray = {"address": head.address, "requests": {"sae": {"num_gpus": 8}}}
    config = on_ray(tmp_path / "root", corpus, head.address, ray=ray)
    code, _, err = CommandLine(config, tmp_path, **head.environment, **shared_server).finish(300)
    assert code == 2, err
    assert "execution.ray.requests.sae: no machine of the Ray cluster" in err
    assert "1 CPUs and 8 GPUs" in err
    assert "has 2 CPUs and 0 GPUs" in err
    assert count_records(config.execution.root) == 0


def test_what_others_keep_is_waited_for_no_longer_than_told(
    head: Head, tmp_path: Path, corpus: Path, shared_server: dict[str, Any]
) -> None:
    settings = {"address": head.address, "resource_timeout_seconds": 3}
    with head.held_by_others():
        config = on_ray(tmp_path / "root", corpus, head.address, ray=settings)
        code, _, err = CommandLine(config, tmp_path, **head.environment, **shared_server).finish(300)
    assert code == 75, err
    assert "has had room for freeze_segment for 3 s" in err
    assert "0 CPUs and 0 GPUs are free" in err


def test_who_has_no_token_is_told_so(head: Head, tmp_path: Path, corpus: Path, shared_server: dict[str, Any]) -> None:
    config = on_ray(tmp_path / "root", corpus, head.address)
    for content, complaint in (
        (None, "asks for a token, and this process has none"),
        ("no", "does not take the token"),
    ):
        home = tmp_path / complaint
        (home / ".ray").mkdir(parents=True)
        if content is not None:
            (home / ".ray" / "auth_token").write_text(content)
        environment = head.environment | {"HOME": str(home)}
        code, _, err = CommandLine(config, tmp_path, **environment, **shared_server).finish(120)
        assert code == 2, err
        assert complaint in err


def test_a_cluster_that_lets_everybody_in_is_not_used(
    tmp_path: Path, corpus: Path, shared_server: dict[str, Any]
) -> None:
    head = Head(tmp_path, token=False)
    try:
        head.wait_until_up()
        config = on_ray(tmp_path / "root", corpus, head.address)
        environment = head.environment | {"RAY_AUTH_MODE": "token"}
        code, _, err = CommandLine(config, tmp_path, **environment, **shared_server).finish(120)
    finally:
        head.stop()
    assert code == 2, err
    assert "asks for no token, so whoever reaches it can run anything" in err
