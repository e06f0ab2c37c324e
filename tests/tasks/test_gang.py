"""Calls in gangs of real processes, really killed: the cause is named, another attempt ends right, nobody is left."""

import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from sae.config import DeviceChoice
from sae.errors import ConfigError, PipelineError, StopRequested, TransientError
from sae.pipeline_config import NodeConfig
from sae.train.config import MeshConfig
from tasks.caching import Job, produce
from tasks.gang import GangConfig, run_gang
from tasks.process import WorkerCrash, accept_work, stop_workers
from tests.processes import is_alive, marked, wait_for
from tests.tasks import gang_work, work
from tests.tasks.work import ThingSpec

TWO_NODES = (NodeConfig(address=IPv4Address("127.0.0.1")), NodeConfig(address=IPv4Address("127.0.0.2")))
COLLECTIVE_SECONDS = 8.0
MARK = "SAE_PIPELINE_TEST_GANG"


def pids_in(folder: Path) -> list[int]:
    """Of the ranks, and of their agents."""
    return [int(pid) for file in folder.glob("pids-*") for pid in file.read_text().split()]


def add_up(
    folder: Path, nodes: Sequence[NodeConfig] = (), *, how: dict[str, Any] | None = None, **arguments: Any
) -> None:
    """`gang_work.add_up` by two ranks; afterwards nobody is left."""
    settings: dict[str, Any] = {"collective_timeout_seconds": COLLECTIVE_SECONDS} | (how or {})
    call = {name: settings.pop(name) for name in ("limit_seconds", "progress") if name in settings}
    try:
        run_gang(
            gang_work.add_up,
            str(folder / "root"),
            {"folder": str(folder)} | arguments,
            GangConfig(mesh=MeshConfig(data=2), nodes=nodes, threads=1, **settings),
            **call,
        )
    finally:  # what is killed closes its files a moment before it is gone
        wait_for(lambda: not any(map(is_alive, pids_in(folder))), 2)


def test_a_lost_rank_costs_all_and_the_next_attempt_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TransientError, match=r"rank 1 \(node 127.0.0.1\) of .*:add_up was killed by SIGKILL"):
        add_up(tmp_path, fault="rank SIGKILL")
    caplog.clear()
    seen: list[tuple[int, int, str]] = []
    with caplog.at_level(logging.INFO, "sae.adding"):
        add_up(tmp_path, how={"progress": lambda done, total, unit, note: seen.append((done, total, unit))})
    assert (tmp_path / "result").read_text() == gang_work.expected(2)
    assert seen[0] == (11, gang_work.N_STEPS, "steps")
    assert seen[-1] == (gang_work.N_STEPS, gang_work.N_STEPS, "steps")
    said = [record.getMessage() for record in caplog.records if record.name == "sae.adding"]
    assert sorted(said) == ["adds", "rank 1: adds"]


def test_a_crash_comes_with_the_traceback_of_the_rank_that_it_happened_in(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrash, match="in rank 1 ") as caught:
        add_up(tmp_path, fault="bug")
    assert "ZeroDivisionError: a bug" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [(), TWO_NODES], ids=["one-node", "two-nodes"])
@pytest.mark.parametrize("step", [13, gang_work.N_STEPS], ids=["in-a-step", "at-the-last-step"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("rank SIGKILL", TransientError),
        ("rank SIGSTOP", TransientError),
        ("agent SIGKILL", TransientError),
        ("agent SIGSTOP", None),  # its ranks go on without it
        ("rank SIGTERM", StopRequested),
        ("agent SIGTERM", StopRequested),
        ("hang", TransientError),
    ],
)
def test_after_any_loss_another_attempt_ends_right(
    tmp_path: Path, nodes: Sequence[NodeConfig], step: int, fault: str, error: type[PipelineError] | None
) -> None:
    if error is None:
        add_up(tmp_path, nodes, fault=fault, fault_step=step)
    else:
        with pytest.raises(error) as caught:
            add_up(tmp_path, nodes, fault=fault, fault_step=step)
        assert caught.value.retryable
    if error is StopRequested:
        stopped = [file.read_text() for file in tmp_path.glob("stopped-*")]
        assert len(stopped) == 2
        assert len(set(stopped)) == 1
        assert (tmp_path / "checkpoint.json").read_text().startswith(f"[{stopped[0]},")
    add_up(tmp_path, nodes)
    assert (tmp_path / "result").read_text() == gang_work.expected(2)
    assert (tmp_path / "fault").exists()


@pytest.mark.slow
def test_a_node_may_come_later_than_a_collective_may_take(tmp_path: Path) -> None:
    late = TWO_NODES[1].model_copy(update={"command": ("sh", "-c", 'sleep 8; exec "$@"', "late")})
    add_up(tmp_path, (TWO_NODES[0], late), how={"collective_timeout_seconds": 2.0})
    assert (tmp_path / "result").read_text() == gang_work.expected(2)


@pytest.mark.slow
def test_a_node_that_does_not_reach_the_first_is_named(tmp_path: Path) -> None:
    if subprocess.run(["sh", "-c", "unshare --net true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no network namespaces")
    apart = TWO_NODES[1].model_copy(update={"command": ("unshare", "--net")})
    with pytest.raises(TransientError, match=r"^rank 1 \(node 127.0.0.2\) .* ended with its agent: Dist"):
        add_up(tmp_path, (TWO_NODES[0], apart))


@pytest.mark.slow
def test_an_error_of_one_rank_is_the_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^k > d_sae$"):
        add_up(tmp_path, fault="config")


@pytest.mark.slow
def test_a_rank_that_ends_without_a_word_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"rank 1 .* ended with status 3"):
        run_gang(gang_work.leave, str(tmp_path), {}, GangConfig(mesh=MeshConfig(latents=2)))


@pytest.mark.slow
def test_work_that_was_committed_before_a_rank_was_lost_is_done(tmp_path: Path) -> None:
    job, spec = Job(root=str(tmp_path / "root")), ThingSpec(size=3)
    gang = GangConfig(mesh=MeshConfig(data=2))
    (uri,) = produce(job, [spec], gang_work.make, {"spec": spec, "fault": "rank SIGKILL"}, gang=gang)
    assert Path(uri).is_file()
    again = job.model_copy(update={"recompute": True})
    with pytest.raises(TransientError, match="SIGKILL"):  # what is computed again may be another
        produce(again, [spec], gang_work.make, {"spec": spec, "fault": "rank SIGKILL"}, gang=gang)


@pytest.mark.slow
def test_deadlines_end_what_hangs(tmp_path: Path) -> None:
    patient = {"collective_timeout_seconds": 500.0}
    with pytest.raises(TransientError, match=r"rank \d .* said nothing for \d+ s, the last thing at 1"):
        add_up(tmp_path, fault="hang", how=patient | {"heartbeat_timeout_seconds": 15.0})
    (tmp_path / "fault").unlink()
    with pytest.raises(TransientError, match=r"took longer than 20 s \(execution.task_limit_seconds\)"):
        add_up(tmp_path, fault="hang", how=patient | {"limit_seconds": 20.0})
    with pytest.raises(TransientError, match="took longer than 15 s"):  # also while it shows progress
        add_up(tmp_path, step_seconds=1.0, how={"limit_seconds": 15.0})


@pytest.mark.slow
def test_ranks_and_agents_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.tasks.test_gang import TWO_NODES, add_up\n"
        "add_up(Path(sys.argv[1]), TWO_NODES, step_seconds=60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root) as parent:
        wait_for(lambda: len(pids_in(tmp_path)) == 4)
        os.kill(pids_in(tmp_path)[0], signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, pids_in(tmp_path))), 5)


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_starts_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, mark := uuid.uuid4().hex)
    stopped: list[int] = []

    def stop() -> None:
        wait_for(lambda: marked(MARK, mark, "tasks.rank"))
        stopped.append(marked(MARK, mark, "tasks.rank")[0])
        os.kill(stopped[0], signal.SIGSTOP)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(TransientError):
        add_up(tmp_path, how={"limit_seconds": 15.0})
    stopper.join()
    assert stopped
    wait_for(lambda: not marked(MARK, mark), 2)


@pytest.mark.slow
def test_stopping_saves_the_work_of_all_ranks(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            add_up(tmp_path, TWO_NODES, step_seconds=0.5)
        except BaseException as err:
            errors.append(err)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        wait_for(lambda: len(pids_in(tmp_path)) == 4)
        stop_workers()
        caller.join(20)
        (error,) = errors
        assert isinstance(error, StopRequested)
        assert len({file.read_text() for file in tmp_path.glob("stopped-*")}) == 1
        with pytest.raises(StopRequested):
            add_up(tmp_path)
    finally:
        accept_work()
    add_up(tmp_path)
    assert (tmp_path / "result").read_text() == gang_work.expected(2)


@pytest.mark.slow
def test_nothing_listens_beyond_the_addresses_of_the_nodes(tmp_path: Path) -> None:
    gang = GangConfig(mesh=MeshConfig(data=2), nodes=TWO_NODES)
    run_gang(gang_work.listen_where, str(tmp_path), {"folder": str(tmp_path)}, gang)
    listening = " ".join(file.read_text() for file in tmp_path.glob("listens-*")).split()
    assert listening
    assert set(listening) == {"0100007F"}  # 127.0.0.1


@pytest.mark.slow
def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    elsewhere = (NodeConfig(address=IPv4Address("192.0.2.1")),)
    with pytest.raises(ConfigError, match=r"cannot listen on its address 192\.0\.2\.1"):
        add_up(tmp_path, elsewhere)


@pytest.mark.slow
def test_long_lines_of_all_ranks_arrive_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sae.talking"):
        run_gang(gang_work.print_much, str(tmp_path), {}, GangConfig(mesh=MeshConfig(data=2)))
    said = [record.getMessage() for record in caplog.records if record.name == "sae.talking"]
    assert [line for line in said if not line.startswith("rank")] == [f"{count} {'0' * 9000}" for count in range(50)]
    assert [line for line in said if line.startswith("rank")] == [
        f"rank 1: {count} {'1' * 9000}" for count in range(50)
    ]


@pytest.mark.without_gpu
@pytest.mark.slow
def test_every_rank_is_told_on_which_device_it_computes(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run(device: DeviceChoice) -> None:
        gang = GangConfig(mesh=MeshConfig(data=2), device=device)
        run_gang(work.note_device_in_gang, str(tmp_path), {"log": str(log)}, gang)

    run("auto")
    assert log.read_text().split() == ["cpu"] * 2
    with pytest.raises(ConfigError, match=r"execution\.device: cuda is wanted, and no GPU can be used on"):
        run("cuda")
