"""Library calls in real worker processes: errors arrive, lost and late ones are noticed, nobody is orphaned."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sae.errors import ConfigError, DamagedError, StopRequested, TransientError
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tasks.process import WorkerCrash, _Worker, accept_work, is_stopping, run_in_worker, stop_workers
from tests.processes import is_alive, wait_for
from tests.tasks import work


def read_pids(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and path.read_text())
    return [int(pid) for pid in path.read_text().split()]


def test_a_call_makes_its_artefact_and_reports_on_the_way(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    spec = work.ThingSpec(size=3)
    with caplog.at_level(logging.INFO, "sae.making"):
        run_in_worker(work.make, storage.root, {"spec": spec}, progress=lambda *args: seen.append(args))
    assert require_record(storage, spec.ref).files[0].n_bytes == 3
    assert seen == [(1, 2, "things", "half")]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("sae.making", "made 3")]


def test_workers_are_kept_and_use_the_threads_each_call_gives(storage: Storage, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for size, threads in ((1, 1), (2, 2)):
        spec = work.ThingSpec(size=size)
        run_in_worker(work.make, storage.root, {"spec": spec, "log": str(log)}, threads=threads)
    (first, one), (second, two) = (line.split() for line in log.read_text().splitlines())
    assert (one, two) == ("1", "2")
    assert first == second
    assert int(first) != os.getpid()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("config", ConfigError, "k > d_sae"),
        ("transient", TransientError, "503 SlowDown"),
        ("network", TransientError, "ConnectionResetError: by peer"),
        ("bug", WorkerCrash, "ZeroDivisionError: a bug"),
    ],
)
def test_errors_come_back_as_what_they_were(storage: Storage, kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_in_worker(work.fail, storage.root, {"kind": kind})


def test_a_damaged_artefact_is_named_across_the_border(storage: Storage) -> None:
    with pytest.raises(DamagedError) as caught:
        run_in_worker(work.fail, storage.root, {"kind": "damaged"})
    assert (caught.value.ref, caught.value.part) == ("parts/0123456789abcdef", 3)


def test_a_lost_worker_is_worth_a_retry_and_the_next_call_has_another(storage: Storage) -> None:
    with pytest.raises(TransientError, match="was killed by SIGKILL"):
        run_in_worker(work.die, storage.root, {})
    run_in_worker(work.make, storage.root, {"spec": work.ThingSpec(size=1)})


def test_the_time_limit_ends_blocked_c_code_and_what_it_started(storage: Storage, tmp_path: Path) -> None:
    run_in_worker(work.make, storage.root, {"spec": work.ThingSpec(size=1)})  # a worker that has imported everything
    with pytest.raises(TransientError, match=r"hang took longer than 4 s \(execution.task_limit_seconds\)"):
        run_in_worker(work.hang, storage.root, {"pids": str(tmp_path / "pids")}, limit_seconds=4)
    pids = read_pids(tmp_path / "pids")
    assert len(pids) == 2
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_sigterm_lets_the_work_save_and_is_worth_a_retry(storage: Storage, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def terminate() -> None:
        os.kill(read_pids(pids)[0], signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    with pytest.raises(StopRequested) as caught:
        run_in_worker(work.work_until_stopped, storage.root, {"pids": str(pids)})
    killer.join()
    assert caught.value.retryable
    assert int(pids.with_suffix(".saved").read_text()) > 1


def test_what_computes_is_told_on_which_device(storage: Storage, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_in_worker(work.note_device, storage.root, {"log": str(log)}, device="cpu")
    assert log.read_text() == "cpu"
    run_in_worker(work.note_device, storage.root, {"log": str(log)}, device="auto")
    assert log.read_text() == ("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.mark.without_gpu
def test_a_gpu_is_missed_by_what_computes_and_by_nothing_else(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"execution\.device: cuda is wanted, and no GPU can be used on"):
        run_in_worker(work.note_device, storage.root, {"log": str(tmp_path / "log")}, device="cuda")
    run_in_worker(work.make, storage.root, {"spec": work.ThingSpec(size=3)}, device="cuda")


def test_a_full_gpu_may_have_room_later(storage: Storage) -> None:
    with pytest.raises(TransientError, match=r"fill_a_gpu: the GPU has no memory left .*Lower execution\.max_workers"):
        run_in_worker(work.fill_a_gpu, storage.root, {})


def test_workers_at_once_have_numbers_of_their_own_and_leave_them_to_others() -> None:
    first, second = _Worker(), _Worker()
    try:
        assert first.number != second.number
    finally:
        second.kill()
        first.kill()
    third = _Worker()
    third.kill()
    assert third.number == first.number


def test_stopping_saves_the_work_and_refuses_more(storage: Storage, tmp_path: Path) -> None:
    pids, errors = tmp_path / "pids", []

    def call() -> None:
        try:
            run_in_worker(work.work_until_stopped, storage.root, {"pids": str(pids)})
        except StopRequested as err:
            errors.append(err)

    caller = threading.Thread(target=call)
    caller.start()
    (pid,) = read_pids(pids)
    try:
        stop_workers()
        caller.join(10)
        assert len(errors) == 1
        assert pids.with_suffix(".saved").exists()
        assert not is_alive(pid)
        assert is_stopping()
        with pytest.raises(StopRequested):
            run_in_worker(work.make, storage.root, {"spec": work.ThingSpec(size=1)})
    finally:
        accept_work()


def test_workers_die_with_the_process_that_started_them_even_in_blocked_c_code(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "from tasks.process import run_in_worker\nfrom tests.tasks import work\n"
        f"run_in_worker(work.hang, {str(tmp_path)!r}, {{'pids': {str(pids)!r}}})"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root) as parent:
        worker, _ = read_pids(pids)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not is_alive(worker))
    os.kill(read_pids(pids)[1], signal.SIGKILL)  # the test's own grandchild is nobody's
