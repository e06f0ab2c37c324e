"""A Prefect server and its workers as processes of their own, the project deployed to them, a browser to look with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig
from tests.flows.conftest import tiny_config, write_corpus

PROJECT = Path(__file__).parents[2]
START_SECONDS = 120
RUN_SECONDS = 240


class Prefect:
    """A server on a free loopback port with a home of its own, and what was started beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.home = folder / "home"
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")} | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_UI_API_URL": f"{self.url}/api",  # the pages ask port 4200 without it
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # a new schedule is seen within this time
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "DO_NOT_TRACK": "1",
        }
        self._processes: list[subprocess.Popen[Any]] = []
        self._worker: subprocess.Popen[Any] | None = None

    def start(self, log: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[Any]:
        """Start `python -m ...` with this server; what it prints goes to `<log>.log` in the folder."""
        with self._log(log).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=cwd or self.folder,  # not the project: nothing may depend on where a worker is started
                env=self._environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def run(self, log: str, *arguments: str, cwd: Path | None = None) -> str:
        """Run `python -m ...` to its end. Returns: what it printed."""
        return self.finish(log, self.start(log, *arguments, cwd=cwd))

    def finish(self, log: str, process: subprocess.Popen[Any]) -> str:
        """Wait for a process that must succeed. Returns: what it printed."""
        assert process.wait(RUN_SECONDS) == 0, self.log(log)
        return self._log(log).read_text()

    def start_server(self) -> None:
        server = self.start("server", "prefect", "server", "start", "--port", self.url.rpartition(":")[2])
        wait_for(lambda: server.poll() is not None or self._is_healthy(), START_SECONDS, "the server answers")
        assert server.poll() is None, self.log("server")

    def start_worker(self, **environment: str) -> None:
        arguments = ("prefect", "worker", "start", "--pool", "sae-pipeline", "--limit", "1")
        self._worker = self.start("worker", *arguments, **({"SAE_PIPELINE_HOME": str(PROJECT)} | environment))

    def kill_worker(self) -> None:
        """Kill the worker, and it alone: the process of its run has a session of its own."""
        assert self._worker
        self._worker.kill()
        self._worker.wait()

    def client(self) -> Any:
        """Prefect's own REST client for this server; a context manager."""
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(f"{self.url}/api")

    def trigger(self, deployment: str, config: PipelineConfig, **parameters: Any) -> Any:
        """Create a run of a deployment. Returns: its id."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            parameters["config"] = config.model_dump(mode="json")
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def wait_until_final(self, flow_run: Any) -> Any:
        """Returns: the run's final state."""
        with self.client() as client:

            def final() -> Any:
                state = client.read_flow_run(flow_run).state
                return state if state and state.is_final() else None

            return wait_for(final, RUN_SECONDS, f"flow run {flow_run} ends", self.log)

    def subflows(self, flow_run: Any) -> dict[str, Any]:
        """Returns: ids of the flow runs inside a flow run, by flow (`extract`, ...)."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

        inside = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run]))
        with self.client() as client:
            return {run.name.partition(":")[0]: run.id for run in client.read_flow_runs(flow_run_filter=inside)}

    def task_states(self, flow_run: Any, expected: int) -> Counter[str]:
        """How many tasks of the run's subflows ended in which state, once the history has `expected` of them."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        runs = FlowRunFilter(id=FlowRunFilterId(any_=list(self.subflows(flow_run).values())))
        with self.client() as client:

            def states() -> Counter[str]:
                found = client.read_task_runs(flow_run_filter=runs, limit=200)
                return Counter(run.state_name for run in found if run.state and run.state.is_final())

            wait_for(lambda: states().total() >= expected, 60, f"the server knows {expected} ended tasks")
            return states()

    def processes(self, flow_run: Any = "") -> dict[int, str]:
        """Processes that live with this home (and belong to this flow run, where one is given), by id."""
        home, run = f"PREFECT_HOME={self.home}", f"PREFECT__FLOW_RUN_ID={flow_run}"
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                if home in environment and (not flow_run or run in environment):
                    found[int(path.name)] = (path / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:  # it has ended meanwhile, or is somebody else's
                continue
        return found

    def log(self, name: str = "worker") -> str:
        """The end of what a process printed."""
        path = self._log(name)
        return path.read_text()[-6000:] if path.exists() else ""

    def end(self) -> dict[int, str]:
        """End what was started, workers first. Returns: processes that outlived that, which are killed."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def wait_for(what: Callable[[], Any], seconds: float, name: str, log: Callable[[], str] = str) -> Any:
    """Ask until the answer is true. Returns: the answer."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {name}\n{log()}"
        time.sleep(0.2)
    return answer


def recorded_files(root: str) -> dict[str, list[dict[str, Any]]]:
    """The files that every commit record of a root names, parts included, with their sizes and hashes."""
    paths = [*Path(root).glob("*/*/record.json"), *Path(root).glob("*/*/part-*.json")]
    return {str(path.relative_to(root)): json.loads(path.read_text())["files"] for path in paths}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server and a worker with the project deployed. All that was started ends with the module."""
    started = Prefect(tmp_path_factory.mktemp("prefect"))
    try:
        started.start_server()
        started.run("pool", "prefect", "work-pool", "create", "sae-pipeline", "--type", "process")
        started.start_worker()
        started.run("deploy", "prefect", "--no-prompt", "deploy", "--all", cwd=PROJECT / "deployments")
        yield started
    finally:
        left = started.end()
    assert not left


@pytest.fixture(scope="module")
def tiny(prefect: Prefect) -> PipelineConfig:
    """A config with changed values in every section."""
    write_corpus(prefect.folder / "corpus")
    return tiny_config(prefect.folder / "root", prefect.folder / "corpus")


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty page that can reach nothing but this machine: Prefect's pages ask an analytics service too."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(90_000)  # a page that was refused an answer asks again after 30 s
    context.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
    yield context.new_page()
    context.close()
