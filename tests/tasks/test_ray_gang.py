"""Gangs of real processes by Ray Train, really killed: the cause is named, another attempt ends right, nobody is left.

`make test-ray` installs Ray and runs them.
"""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sae.errors import ConfigError, PipelineError, StopRequested, TransientError
from sae.pipeline_config import ExecutionConfig, RayConfig, RayRequest
from sae.train.config import MeshConfig
from tasks.gang import GangConfig, run_gang
from tasks.process import WorkerCrash, accept_work, stop_workers
from tasks.ray_cluster import ray_cluster
from tasks.ray_gang import RayGang
from tests.processes import is_alive, wait_for
from tests.ray_head import Head
from tests.tasks import gang_work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'sae-pipeline[ray]'"
    ),
]

COLLECTIVE_SECONDS = 10.0
START_SECONDS = 600.0
GONE_SECONDS = 30.0
"""How long Ray may take to end what belonged to a gang."""


@pytest.fixture(autouse=True)
def with_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)


def pids_in(folder: Path) -> list[int]:
    """Of the ranks, and of their workers."""
    return [int(pid) for file in folder.glob("pids-*") for pid in file.read_text().split()]


def gang_on(head: Head, **settings: Any) -> GangConfig:
    settings = {"collective_timeout_seconds": COLLECTIVE_SECONDS, "heartbeat_timeout_seconds": 240.0} | settings
    where = {"address": head.address, "request": RayRequest(), "resource_timeout_seconds": 120.0}
    ray = RayGang.model_validate(where | settings.pop("ray", {}))
    return GangConfig(mesh=MeshConfig(data=2), ray=ray, threads=1, **settings)


def add_up(folder: Path, gang: GangConfig, *, how: dict[str, Any] | None = None, **arguments: Any) -> None:
    """`gang_work.add_up` by two ranks; afterwards nobody is left."""
    try:
        run_gang(gang_work.add_up, str(folder / "root"), {"folder": str(folder)} | arguments, gang, **(how or {}))
    finally:
        wait_for(lambda: not any(map(is_alive, pids_in(folder))), GONE_SECONDS)


def test_what_ranks_do_and_say_arrives(head: Head, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO, "sae.adding"):
        add_up(
            tmp_path,
            gang_on(head),
            step_seconds=0.1,
            how={"progress": lambda done, total, unit, note: seen.append((done, total, unit))},
        )
    assert (tmp_path / "result").read_text() == gang_work.expected(2)
    assert seen[-1] == (gang_work.N_STEPS, gang_work.N_STEPS, "steps")
    assert sorted(record.getMessage() for record in caplog.records) == ["adds", "rank 1: adds"]
    with caplog.at_level(logging.INFO, "sae.talking"):
        run_gang(gang_work.print_much, str(tmp_path), {}, gang_on(head))
    said = [record.getMessage() for record in caplog.records if record.name == "sae.talking"]
    assert [line for line in said if not line.startswith("rank")] == [f"{count} {'0' * 9000}" for count in range(50)]
    assert [line for line in said if line.startswith("rank")] == [
        f"rank 1: {count} {'1' * 9000}" for count in range(50)
    ]


def test_a_cluster_that_is_started_for_the_run_has_gangs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without a token
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("PYTHONPATH")
    mesh, ray = MeshConfig(data=2), RayConfig(address="local", resource_timeout_seconds=120.0)
    execution = ExecutionConfig(root=str(tmp_path / "root"), mesh=mesh, runner="ray", ray=ray)
    with ray_cluster(execution, ["sae"]) as cluster:
        assert cluster is not None
        add_up(tmp_path, GangConfig(mesh=mesh, ray=cluster.gang("sae"), threads=1))
        assert cluster.count_gangs("sae", mesh.world) == max(1, (os.cpu_count() or 1) // 2)
    assert (tmp_path / "result").read_text() == gang_work.expected(2)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        pytest.param(
            "rank SIGKILL",
            TransientError,
            r"rank 1 \(node [\d.]+\) of .*:add_up was killed by SIGKILL",
            id="rank-SIGKILL",
        ),
        pytest.param("rank SIGSTOP", TransientError, None, id="rank-SIGSTOP"),
        pytest.param(
            "agent SIGKILL",
            TransientError,
            r"rank 1 \(node [\d.]+\) .* was lost with its Ray worker \(ActorDied",
            id="agent-SIGKILL",
        ),
        pytest.param("agent SIGSTOP", TransientError, r"rank 1 .* said nothing for \d+ s", id="agent-SIGSTOP"),
        pytest.param("rank SIGTERM", StopRequested, None, id="rank-SIGTERM"),
        pytest.param("hang", TransientError, None, id="hang"),
        pytest.param("bug", WorkerCrash, "ZeroDivisionError: a bug", id="bug"),
        pytest.param("config", ConfigError, r"^k > d_sae$", id="config"),
    ],
)
def test_after_any_loss_another_attempt_ends_right(
    head: Head, tmp_path: Path, fault: str, error: type[Exception], message: str | None
) -> None:
    gang = gang_on(head)
    with pytest.raises(error, match=message) as caught:
        add_up(tmp_path, gang, fault=fault)
    if isinstance(caught.value, PipelineError):
        assert caught.value.retryable == (error is not ConfigError)
    if error is StopRequested:
        stopped = {file.read_text() for file in tmp_path.glob("stopped-*")}
        assert len(stopped) == 1
        assert (tmp_path / "checkpoint.json").read_text().startswith(f"[{stopped.pop()},")
    add_up(tmp_path, gang)
    assert (tmp_path / "result").read_text() == gang_work.expected(2)


def test_what_others_keep_is_waited_for_no_longer_than_told(head: Head, tmp_path: Path) -> None:
    with head.held_by_others():
        started = time.monotonic()
        with pytest.raises(TransientError, match=r"no room for 2 processes with 1 CPUs and 0 GPUs each for 3 s"):
            add_up(tmp_path, gang_on(head, ray={"resource_timeout_seconds": 3.0}))
        assert time.monotonic() - started < 120


def test_a_gang_that_waits_for_room_may_be_stopped(head: Head, tmp_path: Path) -> None:
    with head.held_by_others():
        try:
            stopper = threading.Timer(20, stop_workers)
            stopper.start()
            with pytest.raises(StopRequested):
                add_up(tmp_path, gang_on(head))
            stopper.join()
        finally:
            accept_work()


def test_stopping_saves_the_work_of_all_ranks(head: Head, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            add_up(tmp_path, gang_on(head), step_seconds=2.0)
        except BaseException as err:
            errors.append(err)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        wait_for(lambda: len(pids_in(tmp_path)) == 4, START_SECONDS)
        stop_workers()
        caller.join(60)
        (error,) = errors
        assert isinstance(error, StopRequested)
        assert len({file.read_text() for file in tmp_path.glob("stopped-*")}) == 1
    finally:
        accept_work()


def test_ranks_end_with_the_process_that_started_them(head: Head, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        "from tests.tasks.test_ray_gang import add_up, gang_on\n"
        "add_up(Path(sys.argv[1]), gang_on(SimpleNamespace(address=sys.argv[2])), step_seconds=60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), head.address]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as parent:
        try:
            wait_for(lambda: len(pids_in(tmp_path)) == 4, START_SECONDS)
            for pid in pids_in(tmp_path)[:2]:  # a rank and its worker
                os.kill(pid, signal.SIGSTOP)
        finally:
            parent.kill()
    wait_for(lambda: not any(map(is_alive, pids_in(tmp_path))), GONE_SECONDS)
