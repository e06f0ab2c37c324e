"""The Ray cluster that tasks run on: who may use it, what its machines have in common and have room for.

Ray is imported when a cluster is asked for, not before. A task starts a worker process on its machine, as it does here,
and all of a cluster's machines have the same root: nothing but addresses and small records travels through Ray.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect.settings import get_current_settings

from sae.errors import ConfigError, TransientError
from sae.pipeline_config import ExecutionConfig, RayConfig
from sae.store import layout
from sae.store.storage.filesystem import Storage
from tasks import ray_worker
from tasks.ray_door import check_door
from tasks.ray_requests import check_requests
from tasks.ray_tasks import LOCAL, RayTasks, import_path, machines

logger = logging.getLogger(__name__)

NAMESPACE = "sae-pipeline"
OBJECT_STORE_BYTES = 200_000_000
"""Of a cluster on this machine: through Ray travel small records alone."""
PROBE_SECONDS = 120.0
"""How long a machine of the cluster may take to say what it has installed."""

_connected: str | None = None
"""The address of the cluster that this process has been connected to here."""


@contextlib.contextmanager
def ray_cluster(execution: ExecutionConfig, stages: Sequence[str]) -> Iterator[RayTasks | None]:
    """The cluster that tasks run on while the block runs; None when they run here. Blocks inside use the same one.

    Args:
        stages: whose tasks there will be.

    Raises:
        ConfigError: Ray is not installed, the cluster lets strangers in or does not let this process in, no machine of
            it can ever have what a stage asks for, or its machines have other code or another root.
        TransientError: nobody answers at the address, or a machine does not answer in time.
    """
    if execution.runner == "thread":
        yield None
        return
    config = execution.ray
    assert config
    check_runner(execution)
    import ray

    global _connected
    if ray.is_initialized():
        if _connected != config.address:
            raise ConfigError(
                f"execution.ray.address: this process is connected to another Ray cluster than {config.address}. "
                f"Call ray.shutdown() first."
            )
        with RayTasks(config, execution.retries) as cluster:
            yield cluster
        return
    if config.address != LOCAL:
        check_prefect_server(config.address)
    # Ray prints what workers print, and what it has to say of them; stdout is for who has started this run.
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as connection:
        _connect(ray, config)
        connection.callback(ray.shutdown)
        _connected = config.address
        check_requests(config, stages, machines(), execution.n_ranks)
        if config.address != LOCAL:
            _check_machines(ray, Storage(execution.root))
        with RayTasks(config, execution.retries) as cluster:
            yield cluster


def check_runner(execution: ExecutionConfig) -> None:
    """What can be known to be wrong before anything is started.

    Raises: ConfigError and TransientError as `ray_cluster`, of what is installed here and of who may use the cluster.
    """
    if execution.runner == "thread":
        return
    assert execution.ray
    if missing := [name for name in ("grpc", "ray", "prefect_ray") if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f'execution.runner: "ray" needs packages that are not installed ({", ".join(missing)}). '
            f"Run: pip install 'sae-pipeline[ray]'"
        )
    if execution.ray.address != LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported, and by default a token is not sent
        check_door(execution.ray.address)


def _connect(ray: Any, config: RayConfig) -> None:
    variables: dict[str, str] = {"PREFECT_LOGGING_LEVEL": get_current_settings().logging.level}
    local: dict[str, Any] = {}
    if (path := import_path(config)) is not None:
        variables["PYTHONPATH"] = path
    if config.address == LOCAL:
        local = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if in_main else None
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            config.address,
            namespace=NAMESPACE,
            runtime_env={"worker_process_setup_hook": "tasks.ray_worker.set_up", "env_vars": variables},
            logging_level=logging.ERROR,
            **local,
        )
    except Exception as err:  # a start that took too long is no more than that to Ray
        what = "Ray does not start on this machine" if config.address == LOCAL else f"Ray at {config.address} refuses"
        hint = "" if config.address == LOCAL else " Start the run on a machine of the cluster."
        raise TransientError(f"{what}: {type(err).__name__}: {err}{hint}") from err
    finally:
        if before is not None:  # Ray has put its own handler there
            signal.signal(signal.SIGTERM, before)


def check_prefect_server(address: str) -> None:
    """Raises: ConfigError when tasks on other machines cannot tell the Prefect server what they do."""
    url = get_current_settings().api.url or ""
    if _is_loopback(urlsplit(url).hostname or "") and not _is_loopback(address.rpartition(":")[0]):
        raise ConfigError(
            f"execution.ray.address: tasks on the machines of {address} tell a Prefect server what they do, and they "
            f"do not reach the one of this run, {url}. Run `prefect server start --host` with an address that they "
            f"reach, and set PREFECT_API_URL here."
        )


def _is_loopback(host: str) -> bool:
    if host in ("", "localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ip_address(host.strip("[]")).is_loopback
    return False


def _check_machines(ray: Any, storage: Storage) -> None:
    """Raises: ConfigError when a machine has other code than this one, or not the same folder as its root."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with contextlib.ExitStack() as stack:
        marker = None
        if storage.is_local:
            folder = Path(storage.full(layout.STAGING))
            folder.mkdir(parents=True, exist_ok=True)
            marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix="ray-")).name
        here = ray_worker.facts(marker)
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=only_there)(ray_worker.facts)
                asked[node["NodeManagerAddress"]] = remote.remote(marker)
        for machine, answer in asked.items():
            try:
                there = ray.get(answer, timeout=PROBE_SECONDS)
            except ray.exceptions.GetTimeoutError as err:
                raise TransientError(f"{machine} of the Ray cluster did not answer for {PROBE_SECONDS:g} s") from err
            except ray.exceptions.RayError as err:
                reason = str(err).strip().splitlines()[-1]
                raise ConfigError(
                    f"{machine} of the Ray cluster cannot run tasks: {reason}. Install there what is installed here."
                ) from err
            if other := ray_worker.differing(here, there):
                raise ConfigError(
                    f"{machine} of the Ray cluster has not the same as this machine: {other}. All machines need the "
                    f"same installation, and one root: s3:// or a folder that all have at this path."
                )
