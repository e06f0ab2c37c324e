"""The DAG across two hosts with a bucket on a third, and the cable of the second host pulled in the middle of training.

The hosts are network namespaces with addresses of their own. The run is on the first. Agents on the second are started
in its namespace, so that pipes are never cut, or through a remote shell, whose connection is lost with the network.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sae.plan import PipelineConfig, make_plan
from sae.store import layout
from sae.store.artefacts.records import require_record
from sae.store.storage.filesystem import Storage
from tasks.attempt import EXIT_SECONDS, GONE_SECONDS, HANG_UP_SECONDS, LAST_WORDS_SECONDS
from tasks.tied import tied_command
from tests.bad_days import remote_shell
from tests.bad_days.namespaces import Host, hosts
from tests.bad_days.place import NotHereError
from tests.conftest import s3_endpoint
from tests.flows.conftest import tiny_config, with_settings
from tests.flows.processes import MARK, CommandLine, contents
from tests.flows.test_s3 import strays
from tests.processes import marked, wait_for

pytestmark = pytest.mark.slow

SAE = {"sae": {"architecture": "topk", "d_sae": 64, "k": 4, "k_aux": 8}, "batch_rows": 128}
NO_CONTROL = {"evaluation": {"n_contexts": 16, "n_bootstrap": 20, "untrained": None}}
"""The same DAG without its copy on an untrained model."""
N_TOKENS = 100_000
"""Of the trainings that are disturbed: some 780 steps."""
CUT_SECONDS = 20.0
PREFECT_PORT = 4200
"""On a host of its own it is free."""
RUN_SECONDS = 600
PATIENT, IMPATIENT = {"collective_timeout_seconds": 90.0}, {"collective_timeout_seconds": 10.0}
"""Longer and shorter than the cut."""
HEARTBEAT_SECONDS = 60.0
DEADLINE_SECONDS = HEARTBEAT_SECONDS + LAST_WORDS_SECONDS + EXIT_SECONDS + HANG_UP_SECONDS + GONE_SECONDS
"""For the end of an attempt."""


@dataclass
class Lab:
    """Two hosts and a bucket on a third.

    Attributes:
        environment: of whatever runs on the hosts.
        mark: what processes have in theirs that are started by the remote shell.
    """

    first: Host
    second: Host
    environment: dict[str, str | None]
    root: str
    mark: str

    def call(self, function: Callable[..., Any], *arguments: str) -> Any:
        """What a function of this module returns on the first host, where the bucket can be seen."""
        code = f"import json, sys\nfrom {__name__} import {function.__name__} as f\nprint(json.dumps(f(*sys.argv[1:])))"
        command = self.first.command(sys.executable, "-P", "-c", code, *arguments)
        done = subprocess.run(command, env=self._clean(), stdout=subprocess.PIPE, timeout=300, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    @contextlib.contextmanager
    def remote_shell(self) -> Iterator[tuple[str, ...]]:
        """The command that starts what follows it on the second host, while the block runs there."""
        command = ("-P", "-m", remote_shell.__name__, "serve", str(self.second.address), str(os.getpid()))
        served = self.second.command(sys.executable, *command)
        with subprocess.Popen(served, env=self._clean() | {MARK: self.mark}, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout
                assert server.stdout.readline()
                yield (*remote_shell.ON, str(self.second.address))
            finally:
                server.kill()

    @contextlib.contextmanager
    def prefect_server(self) -> Iterator[None]:
        """A server on the first host, while the block runs: a new database is made once, not by every run."""
        server = ("-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error")
        command = self.first.command(*tied_command(sys.executable, *server, "--port", str(PREFECT_PORT)))
        self.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{PREFECT_PORT}/api"
        with subprocess.Popen(command, env=self._clean()) as process:
            try:
                self.call(wait_for_server)
                yield
            finally:
                process.kill()

    def run(self, config: PipelineConfig, folder: Path, *options: str) -> CommandLine:
        """Start a run on the first host."""
        return CommandLine(config, folder, *options, through=self.first.command(), **self.environment)

    def left(self, run: CommandLine) -> list[int]:
        """Processes of a run, on either host."""
        return run.alive() + marked(MARK, self.mark, "tasks.")

    def _clean(self) -> dict[str, str]:
        here = {"PYTHONPATH": str(Path(__file__).parents[2])}  # tests are not installed
        names = os.environ | self.environment | here
        return {name: value for name, value in names.items() if value is not None}


def wait_for_server() -> None:
    url = os.environ["PREFECT_API_URL"]

    def is_up() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(json.load(answer))
        return False

    wait_for(is_up, 280)


def make_bucket(name: str) -> None:
    from sae.store.storage import s3

    s3.connect().mkdir(name)


def wait_for_checkpoint(root: str, ref: str) -> str:
    """Wait until there is one. Returns: its path."""
    storage, found = Storage(root), []
    while not found:
        found = [path for path in storage.sizes(layout.checkpoint_folder(ref)) if path.endswith(".json")]
        time.sleep(0.1)
    return found[0]


def what_is_there(file: str, only: str) -> tuple[dict[str, str], list[str]]:
    """What is finished of a config, and the objects that no record names."""
    config = PipelineConfig.model_validate_json(Path(file).read_text())
    return finished_artefacts(config, only), strays(Storage(config.execution.root))


def finished_artefacts(config: PipelineConfig, only: str) -> dict[str, str]:
    """Content digests. Raises: StoreError when one is not finished."""
    if not only:
        return contents(config)
    storage, refs = Storage(config.execution.root), [spec.ref for spec in make_plan(config).specs()]
    return {ref: require_record(storage, ref).content for ref in refs if ref.startswith(only)}


def on_mesh(config: PipelineConfig, root: str, **execution: Any) -> PipelineConfig:
    """The config on a mesh of 1 x 2."""
    common = {"root": root, "retry_delay_seconds": 1, "threads": 1, "mesh": {"latents": 2}}
    return with_settings(config, {"execution": common | {"checkpoint_every_steps": 50} | execution})


def across(lab: Lab, config: PipelineConfig, command: tuple[str, ...] = (), **execution: Any) -> PipelineConfig:
    """The config on both hosts, a process each."""
    command = command or tuple(lab.second.command())
    nodes = [{"address": str(lab.first.address)}, {"address": str(lab.second.address), "command": list(command)}]
    return on_mesh(config, lab.root, nodes=nodes, **execution)


def disturbed(config: PipelineConfig, *seeds: int) -> PipelineConfig:
    """Trainings on the activations that the config has."""
    return with_settings(config, {"saes": [SAE | {"n_tokens": N_TOKENS, "seed": seed} for seed in seeds]})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Hosts with their network."""
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.ExitStack() as open_:
        try:
            first, second, third = open_.enter_context(hosts(3))
        except NotHereError as err:
            pytest.skip(str(err))
        url = open_.enter_context(s3_endpoint(third.command(), str(third.address)))
        environment: dict[str, str | None] = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_UI_ENABLED": "0",
        }
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        lab = Lab(first, second, environment, f"s3://{bucket}/runs", uuid.uuid4().hex)
        lab.call(make_bucket, bucket)
        open_.enter_context(lab.prefect_server())
        yield lab


@pytest.fixture(scope="module")
def alone(lab: Lab, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """The DAG on one host with its disk, and there the trainings that will be disturbed elsewhere."""
    folder = tmp_path_factory.mktemp("alone")
    config = on_mesh(with_settings(tiny_config(folder, corpus), NO_CONTROL), str(folder / "root"))
    for each, options in ((config, ()), (disturbed(config, 1, 2, 3, 4), ("--only", "sae"))):
        code, _, err = lab.run(each, folder, *options).finish(RUN_SECONDS)
        assert code == 0, err
    return config


@pytest.fixture(scope="module")
def extracted(lab: Lab, alone: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """The DAG across both hosts, finished; its ranks were seen on both."""
    folder = tmp_path_factory.mktemp("across")
    config = across(lab, alone)
    run, seen = lab.run(config, folder), set()

    def on_both_or_ended() -> bool:
        for pid in run.children("tasks.rank"):
            with contextlib.suppress(OSError):
                seen.add(os.readlink(f"/proc/{pid}/ns/net"))
        return len(seen) > 1 or run.process.poll() is not None

    wait_for(on_both_or_ended, RUN_SECONDS)
    code, _, err = run.finish(RUN_SECONDS)
    assert code == 0, err
    assert len(seen) == 2
    assert lab.left(run) == []
    return config


def compare(lab: Lab, config: PipelineConfig, alone: PipelineConfig, folder: Path, only: str = "") -> None:
    """The artefacts of a config have the bytes of the one host's, and nothing else lies in the bucket.

    Args:
        only: those whose addresses begin so.
    """
    (file := folder / "config.json").write_text(config.model_dump_json())
    found, stray = lab.call(what_is_there, str(file), only)
    assert found == finished_artefacts(on_mesh(config, alone.execution.root), only)
    assert stray == []


def cut_in_training(lab: Lab, config: PipelineConfig, folder: Path) -> CommandLine:
    """Start a training, and pull the cable after its first checkpoint."""
    (spec,) = make_plan(config).saes
    run = lab.run(config, folder, "--only", "sae")
    lab.call(wait_for_checkpoint, lab.root, spec.ref)
    assert run.process.poll() is None, "it ended before the cable was pulled"
    lab.second.cut()
    return run


def test_the_dag_across_two_hosts_has_the_bytes_of_one_host(
    lab: Lab, alone: PipelineConfig, extracted: PipelineConfig, tmp_path: Path
) -> None:
    compare(lab, extracted, alone, tmp_path)


def test_a_cut_that_is_shorter_than_the_timeout_is_waited_out(
    lab: Lab, alone: PipelineConfig, extracted: PipelineConfig, tmp_path: Path
) -> None:
    config = across(lab, disturbed(alone, 1), retries=0, heartbeat_timeout_seconds=120.0, **PATIENT)
    run = cut_in_training(lab, config, tmp_path)
    time.sleep(CUT_SECONDS)
    lab.second.join()
    code, _, err = run.finish(RUN_SECONDS)
    assert code == 0, err
    compare(lab, config, alone, tmp_path, "saes/")
    assert lab.left(run) == []


@pytest.mark.parametrize("launcher", ["namespace", "remote shell"])
def test_a_cut_that_is_longer_costs_retries_and_no_byte(
    launcher: str, lab: Lab, alone: PipelineConfig, extracted: PipelineConfig, tmp_path: Path
) -> None:
    seed = 2 if launcher == "namespace" else 3
    with lab.remote_shell() if launcher == "remote shell" else contextlib.nullcontext(()) as command:
        config = across(
            lab, disturbed(alone, seed), command, retries=6, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **IMPATIENT
        )
        run = cut_in_training(lab, config, tmp_path)
        time.sleep(CUT_SECONDS)
        lab.second.join()
        code, _, err = run.finish(RUN_SECONDS)
        assert code == 0, err
        assert "it will be tried again" in err
        compare(lab, config, alone, tmp_path, "saes/")
        wait_for(lambda: lab.left(run) == [], 2 * remote_shell.ALIVE_SECONDS)


def test_a_cut_for_ever_ends_in_an_error_within_the_deadline_and_nobody_is_left(
    lab: Lab, alone: PipelineConfig, extracted: PipelineConfig, tmp_path: Path
) -> None:
    retries = 1
    with lab.remote_shell() as command:
        config = across(
            lab,
            disturbed(alone, 4),
            command,
            retries=retries,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **IMPATIENT,
        )
        run = cut_in_training(lab, config, tmp_path)
        code, _, err = run.finish((1 + retries) * DEADLINE_SECONDS + 30)
        assert code == 75
        assert "node 10.77.0.2" in err.splitlines()[-1]
        wait_for(lambda: lab.left(run) == [], 2 * remote_shell.ALIVE_SECONDS)
        lab.second.join()
        config = across(lab, disturbed(alone, 4), command, heartbeat_timeout_seconds=120.0, **PATIENT)
        code, _, err = lab.run(config, tmp_path, "--only", "sae").finish(RUN_SECONDS)
        assert code == 0, err
        compare(lab, config, alone, tmp_path, "saes/")
