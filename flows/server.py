"""A Prefect server for one run, where none is configured: it dies with the run, and is started again if it dies first.

Prefect's own ephemeral server outlives a run that is killed, and a run does not outlive it. Here the run keeps the
listening socket, so requests wait in its queue while a lost server is started again on the same database.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    get_current_settings,
    temporary_settings,
)

from sae.errors import TransientError
from tasks.process import start_workers
from tasks.tied import tied_command, with_import_path

if TYPE_CHECKING:
    from sae.plan import PipelineConfig

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
STOP_SECONDS = 3.0
"""For a server to end; SQLite loses nothing when it is killed then."""
RESTARTS = 5
"""A server that dies more often than this is not started again."""


@contextlib.contextmanager
def prefect_server() -> Iterator[None]:
    """The server that PREFECT_API_URL names, or one of this process's own while the block runs.

    Raises: TransientError when its own does not come up.
    """
    if get_current_settings().api.url:
        yield
        return
    logger.info("no PREFECT_API_URL: starting a Prefect server for this run, about ten seconds")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        server = _Server(listening)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        try:
            server.wait_until_up(url)
            # Nobody watches heartbeats on a server that ends with the run, and every flow waits for its last one.
            with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                yield
        finally:
            server.stop()


def call_flow(name: str, config: "PipelineConfig", **parameters: Any) -> list[dict[str, Any]]:
    """Run a flow on the configured server, or on one of its own.

    Args:
        name: extract, train or report; run: all of them.
        parameters: the flow's others: only, refresh, repair.

    Returns: the outcome of every task.
    Raises: TransientError when the server fails; what the flow raises.
    """
    module = {"run": "pipeline"}.get(name, name)
    flow = getattr(importlib.import_module(f"flows.{module}"), module)
    start_workers(1)  # while the server starts
    try:
        with prefect_server():
            return list(flow(config, **parameters))
    except (httpx.HTTPError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and "Failed to reach API" not in str(err):  # Prefect has no error type for it
            raise
        raise TransientError(
            f"the Prefect server failed ({os.environ.get('PREFECT_API_URL', 'of this run')}): {type(err).__name__}: "
            f"{err}. What was finished is in the store; run the same command again."
        ) from err


class _Server:
    """The server process and the thread that starts it, and starts it again."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self.lost = False
        # The server is tied to the thread that starts it, so the thread stays.
        self._thread = threading.Thread(target=self._keep_up, name="prefect-server", daemon=True)
        self._thread.start()

    def wait_until_up(self, url: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not self.lost:
            with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if json.load(answer) is True:
                    return
            time.sleep(0.1)
        raise TransientError(
            "the Prefect server for this run did not come up. Start one with `prefect server start` and set "
            "PREFECT_API_URL, or run again with PREFECT_LOGGING_LEVEL=INFO to see why."
        )

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(20)

    def _keep_up(self) -> None:
        for _ in range(1 + RESTARTS):
            with _database_lock():  # two servers must not migrate a new database at once
                self._process = self._start()
                self._until_answering()
            while self._process.poll() is None and not self._stopping.wait(0.2):
                pass
            if self._stopping.is_set():
                break
            logger.warning("the Prefect server ended with status %d; starting it again", self._process.returncode)
        self.lost = not self._stopping.is_set()
        assert self._process
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        descriptor = self._listening.fileno()
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        flags = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        quiet = None if logging.getLogger("prefect").isEnabledFor(logging.INFO) else subprocess.DEVNULL
        return subprocess.Popen(
            tied_command(
                *(sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"),
                *("--fd", str(descriptor), "--log-level", "error", "--lifespan", "on"),
            ),
            pass_fds=(descriptor,),
            env=with_import_path(os.environ | settings | flags),
            stdout=subprocess.DEVNULL,
            stderr=quiet,
            start_new_session=True,
        )

    def _until_answering(self) -> None:
        """Wait until the new process takes requests, or has ended."""
        port = self._listening.getsockname()[1]
        deadline = time.monotonic() + START_SECONDS
        assert self._process
        while self._process.poll() is None and time.monotonic() < deadline and not self._stopping.is_set():
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=1),
            ):
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _database_lock() -> Iterator[None]:
    """Held while a server starts; given up by the kernel when its holder dies."""
    home = Path(PREFECT_HOME.value())
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "sae-pipeline.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
