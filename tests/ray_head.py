"""A Ray cluster on this machine, as somebody would start it by hand, and somebody else who uses it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.processes import marked, wait_for

MARK = "SAE_PIPELINE_TEST_RAY"
RAY = str(Path(sys.executable).with_name("ray"))
HOLD = """
import sys, time, ray
ray.init(sys.argv[1], logging_level="ERROR")
ray.get(ray.util.placement_group([{"CPU": 2}]).ready())
print("held", flush=True)
time.sleep(3600)
"""


class Head:
    """A cluster of two CPUs.

    Args:
        token: whether it asks for one, which is then in `home`.
    """

    def __init__(self, folder: Path, *, token: bool = True) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self._temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets are short
        self.environment = {
            "HOME": str(self.home),
            "RAY_AUTH_MODE": "token" if token else "disabled",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            # On a loaded machine.
            "RAY_worker_register_timeout_seconds": "600",
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # what else the machine does is no reason to kill tasks
        }
        if token:
            self._run("get-auth-token", "--generate")
        self._start()

    def wait_until_up(self) -> None:
        """Ray gives up when a process of its own takes 15 s to start; then it is started again."""
        for _ in range(10):
            wait_for(lambda: self._process.poll() is not None or self._has_node(), 300)
            if self._process.poll() is None:
                return
            self._end()
            self._start()
        raise AssertionError("Ray did not start")

    def stop(self) -> None:
        self._end()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self) -> None:
        port, *others = free_ports(5)
        self.address = f"127.0.0.1:{port}"
        # With ports given Ray does not wait, a few seconds at most, for its agents to have found some.
        names = ("metrics-export-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port")
        agents = zip((*names, "runtime-env-agent-port"), others, strict=True)
        self._process = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"),
                *("--object-store-memory=200000000", "--include-dashboard=false", "--disable-usage-stats"),
                *(f"--temp-dir={self._temporary}", *(f"--{name}={number}" for name, number in agents)),
            ],
            env=os.environ | self.environment | {MARK: str(self.home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @contextlib.contextmanager
    def held_by_others(self) -> Iterator[None]:
        """While another process has all CPUs of the cluster."""
        command = [sys.executable, "-c", HOLD, self.address]
        with subprocess.Popen(command, env=os.environ | self.environment, stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout
                assert other.stdout.readline() == "held\n"
                yield
            finally:
                other.kill()

    def _end(self) -> None:
        for pid in marked(MARK, str(self.home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _has_node(self) -> bool:
        return " node_" in self._run("status", "--address", self.address)

    def _run(self, *command: str) -> str:
        """What a command of Ray prints; nothing when it fails."""
        done = subprocess.run([RAY, *command], env=os.environ | self.environment, capture_output=True, text=True)
        return "" if done.returncode else done.stdout


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
