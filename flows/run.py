"""One run's bookkeeping: submit tasks against the store, wait for them, remember what was computed."""

import contextlib
import inspect
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from prefect import Task
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from flows.repair import Outcomes, address
from flows.stages import FOLLOWS, STAGES, Stage
from sae.config import DeviceChoice, FrozenConfig, Spec
from sae.errors import ConfigError, StoreError
from sae.pipeline_config import ExecutionConfig, NodeConfig
from sae.preflight import check_devices
from sae.store.artefacts.checkpoints import remove_checkpoints
from sae.store.storage.filesystem import Storage
from sae.train.config import MeshConfig
from tasks.caching import Job, has_all_parts, is_stored
from tasks.gang import GangConfig
from tasks.process import accept_work, stop_workers
from tasks.progress import show_progress
from tasks.ray_cluster import ray_cluster
from tasks.ray_tasks import RayTasks
from tasks.results import result_storage
from tasks.retries import delays

logger = logging.getLogger(__name__)


class Outcome(FrozenConfig):
    """What became of one task."""

    stage: Stage
    task: str
    ref: str
    part: int | None
    n_parts: int = 1
    """More than one: from `part` on, in one task."""
    outcome: Literal["computed", "cached"]
    """cached: its artefact was found in the store."""


class Future(Protocol):
    """A task that has been submitted."""

    def result(self) -> list[str]:
        """Wait for it. Raises: the task's error."""


class Run:
    """Submits tasks of one flow run and keeps their outcomes.

    As a context manager it is connected to the cluster that tasks run on, if any, and asks the worker processes to save
    and end when the flow is interrupted or terminated.

    Args:
        only: submit the tasks of this stage alone; what they need must be in the store.
        refresh: compute this stage and what follows again.
        repair: addresses of artefacts to compute again whatever the store says.
        outcomes: where what became of each task is added.

    Raises: ConfigError for a root in memory; as a context manager as `check_devices` and `ray_cluster`.
    """

    def __init__(
        self,
        execution: ExecutionConfig,
        only: Stage | None,
        refresh: Stage | None,
        repair: Sequence[str],
        outcomes: Outcomes,
    ) -> None:
        self.storage = Storage(execution.root)
        if self.storage.protocol == "memory":
            raise ConfigError(
                f"execution.root: {execution.root} is seen by one process, and tasks run in processes of their own. "
                f"Use a local folder or s3://."
            )
        self.execution = execution
        self._outcomes, self._first, self._only, self._repair = outcomes, len(outcomes), only, repair
        self._refreshed = FOLLOWS[refresh] if refresh else ()
        self._results = result_storage(self.storage)
        self._started = time.monotonic()
        self._cluster: RayTasks | None = None
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        accept_work()
        check_devices(self.execution)
        self._cluster = self._entered.enter_context(
            ray_cluster(self.execution, STAGES if self._only is None else [self._only])
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ctrl-C, and Prefect's own signal for SIGTERM, are no Exceptions.
        if error is not None and not isinstance(error, Exception):
            stop_workers()
        self._entered.__exit__(kind, error, traceback)

    def wants(self, stage: Stage) -> bool:
        """Whether tasks of this stage are submitted at all."""
        return self._only in (None, stage)

    def has_all_parts(self, stage: Stage, spec: Spec) -> bool:
        """Whether the store holds a part set with all its parts, and none of them is to be computed again."""
        recompute = stage in self._refreshed or self.is_to_repair(spec.ref, None)
        return not recompute and is_stored(self.storage, [spec]) and has_all_parts(self.storage, spec.ref)

    def submit(
        self,
        stage: Stage,
        task: Task[..., list[str]],
        specs: Sequence[Spec],
        *,
        part: int | None = None,
        parts: Sequence[range] | None = None,
        stored: Sequence[bool] | None = None,
        single: bool = True,
        **parameters: Any,
    ) -> Future | None:
        """Submit a task for these artefacts.

        Args:
            part: of the artefacts.
            parts: for a task that makes many; of each artefact its own.
            stored: of every spec, whether the store has what the task makes; None: it is asked.
            single: it runs alone and gets all cores; otherwise the cores are shared by `max_workers` tasks.
            parameters: what the task takes besides specs, part and job.

        Returns: its future; None when another stage was asked for.
        """
        if not self.wants(stage):
            return None
        of_each: Sequence[Sequence[int | None]] = parts or [[part]] * len(specs)
        made = list(zip(specs, of_each, strict=True))
        recompute = stage in self._refreshed or any(
            self.is_to_repair(spec.ref, number) for spec, numbers in made for number in numbers
        )
        if stored is None:
            stored = [all(is_stored(self.storage, [spec], number) for number in numbers) for spec, numbers in made]
        for (spec, numbers), there in zip(made, stored, strict=True):
            how: Literal["computed", "cached"] = "cached" if there and not recompute else "computed"
            outcome = Outcome(
                stage=stage, task=task.name, ref=spec.ref, part=numbers[0], n_parts=len(numbers), outcome=how
            )
            self._outcomes.append(outcome.model_dump())
        if part is not None:
            parameters["part"] = part
        if parts is not None:
            parameters["parts"] = [(numbers.start, numbers.stop) for numbers in parts]
        if "specs" in inspect.signature(task.fn).parameters:
            parameters["specs"] = list(specs)
        else:
            (parameters["spec"],) = specs
        execution = self.execution
        job = Job(
            # Elsewhere a relative path would be another folder.
            root=execution.root if self._cluster is None else self.storage.root,
            recompute=recompute,
            threads=self._threads(stage, single),
            device=self._device(stage),
            limit_seconds=execution.task_limit_seconds,
        )
        task = task.with_options(
            retries=execution.retries,
            retry_delay_seconds=delays(execution.retry_delay_seconds, execution.retries),
            result_storage=self._results,
            # Prefect's cache is believed only where the store agrees.
            refresh_cache=recompute or not all(stored),
        )
        parameters["job"] = job
        if self._cluster is not None and parameters.get("gang") is None:
            return self._cluster.submit(task, parameters, stage)
        if self._cluster is not None:  # the task waits here, for processes that Ray has
            self._cluster.make_room()
        return task.submit(**parameters)

    def do(self, stage: Stage, task: Task[..., list[str]], specs: Sequence[Spec], **parameters: Any) -> None:
        """Run one task and wait for it; it gets all cores. Raises: the task's error."""
        self.do_each(stage, task, [(specs, parameters)])

    def do_each(
        self, stage: Stage, task: Task[..., list[str]], jobs: Sequence[tuple[Sequence[Spec], dict[str, Any]]]
    ) -> None:
        """Run tasks that get all cores: one after the other here; on a cluster `max_workers` at a time, and not more
        gangs than there is room for.

        Args:
            jobs: specs, and what the task takes besides.

        Raises: the first error.
        """
        in_flight: deque[Future] = deque()
        for specs, parameters in jobs:
            if len(in_flight) >= self._at_once(stage, parameters.get("gang")):
                in_flight.popleft().result()
            if (future := self.submit(stage, task, specs, **parameters)) is not None:
                in_flight.append(future)
        for future in in_flight:
            future.result()

    def train(
        self, stage: Stage, task: Task[..., list[str]], groups: Sequence[Sequence[Spec]], **parameters: Any
    ) -> None:
        """Run a task that writes checkpoints for each group of specs. Raises: the first error."""
        parameters["checkpoint_every_steps"] = self.execution.checkpoint_every_steps
        self.do_each(stage, task, [(specs, dict(parameters)) for specs in groups])
        if self.wants(stage):
            for specs in groups:
                for spec in specs:  # a run that was killed just after its commit has left them
                    remove_checkpoints(self.storage, spec.ref)

    @property
    def on_cluster(self) -> bool:
        """Whether tasks have machines of their own, rather than all this one."""
        return self._cluster is not None

    def gang(self, stage: Stage) -> GangConfig | None:
        """The processes that share an SAE. None: they are one."""
        return self._gang_of(stage, self.execution.mesh, self.execution.nodes)

    def gang_of_latents(self, stage: Stage) -> GangConfig | None:
        """The processes that share an SAE's latents, without those that have other rows. None: there is one."""
        mesh, nodes = self.execution.mesh, self.execution.nodes
        # As few machines as have equally many of them, and no more on one than there are in training.
        n_machines = len(nodes) // math.gcd(len(nodes), mesh.data) if nodes else 0
        return self._gang_of(stage, MeshConfig(latents=mesh.latents), nodes[:n_machines])

    def _gang_of(self, stage: Stage, mesh: MeshConfig, nodes: tuple[NodeConfig, ...]) -> GangConfig | None:
        if mesh.world == 1:
            return None
        execution = self.execution
        per_machine = mesh.world // max(1, len(nodes))
        ray = self._cluster.gang(stage) if self._cluster is not None else None
        threads = ray.request.num_cpus if ray is not None else max(1, (os.cpu_count() or 1) // per_machine)
        return GangConfig(
            mesh=mesh,
            nodes=nodes,
            ray=ray,
            threads=execution.threads or threads,
            device=self._device(stage),
            collective_timeout_seconds=execution.collective_timeout_seconds,
            heartbeat_timeout_seconds=execution.heartbeat_timeout_seconds,
        )

    def _at_once(self, stage: Stage, gang: GangConfig | None) -> int:
        if self._cluster is None:
            return 1
        n_workers = self.execution.max_workers
        return n_workers if gang is None else min(n_workers, self._cluster.count_gangs(stage, gang.mesh.world))

    def fan_out(
        self,
        stage: Stage,
        title: str,
        task: Task[..., list[str]],
        jobs: Sequence[tuple[Sequence[Spec], int | Sequence[range]]],
        finished: Mapping[str, np.ndarray] | None = None,
        **parameters: Any,
    ) -> None:
        """Run a task for every (specs, part), `max_workers` at a time, under one bar.

        Args:
            jobs: instead of the part, for a task that makes many, each spec's own parts.
            finished: which parts of the artefacts with these addresses the store has, where that is known.

        Raises: the first error.
        """
        if not self.wants(stage):
            return
        sizes = [1 if isinstance(some, int) else sum(map(len, some)) for _, some in jobs]
        n_done, n_parts = 0, sum(sizes)
        in_flight: deque[Future] = deque()
        with show_progress(title) as progress:
            for (specs, some), size in zip(jobs, sizes, strict=True):
                if len(in_flight) >= self.execution.max_workers:
                    in_flight.popleft().result()
                progress(n_done, n_parts, "parts")
                made: dict[str, Any] = {"part": some} if isinstance(some, int) else {"parts": some}
                of_each = [range(some, some + 1)] * len(specs) if isinstance(some, int) else some
                stored = None
                if finished is not None:
                    stored = [bool(finished[spec.ref][each].all()) for spec, each in zip(specs, of_each, strict=True)]
                future = self.submit(stage, task, specs, stored=stored, single=False, **made, **parameters)
                assert future is not None
                in_flight.append(future)
                n_done += size
            for future in in_flight:
                future.result()
            progress(n_parts, n_parts, "parts")

    def tell(self, stage: Stage, what: str) -> None:
        """Log one line: what is there now, and how long it took since the last line."""
        now = time.monotonic()
        mine = [outcome for outcome in self._outcomes[self._first :] if outcome["stage"] == stage]
        if mine:
            cached = all(outcome["outcome"] == "cached" for outcome in mine)
            how = "found in the store" if cached else f"{now - self._started:.0f} s"
            line = f"{stage:<12} {what} ({how})"
            logger.info("%s", line)
            with contextlib.suppress(MissingContextError):
                get_run_logger().info(line)  # kept by the Prefect server
        self._started = now

    def is_to_repair(self, ref: str, part: int | None) -> bool:
        """Whether an artefact, or one part of it, is computed again whatever the store says."""
        # A task without a part of its own may make all parts of its artefact.
        mine = address(ref, part)
        return any(each == mine or (part is None and each.startswith(f"{mine}/")) for each in self._repair)

    def _device(self, stage: Stage) -> DeviceChoice:
        wanted = self.execution.device
        # Whatever such a task may see there is another task's.
        has_none = self._cluster is not None and not self._cluster.request(stage).num_gpus
        return "cpu" if has_none and wanted == "auto" else wanted

    def _threads(self, stage: Stage, single: bool) -> int:
        if self.execution.threads is not None:
            return self.execution.threads
        if self._cluster is not None:
            return self._cluster.request(stage).num_cpus
        cores = os.cpu_count() or 1
        return cores if single else max(1, cores // self.execution.max_workers)


def raise_if_missing(storage: Storage, specs: Sequence[Spec], command: str) -> None:
    """Raises: StoreError naming the first artefact a stage needs that was never finished."""
    for spec in specs:
        if not is_stored(storage, [spec]):
            raise StoreError(
                f"{storage.uri(spec.ref)} was never finished, and {command} needs it. Run `sae-pipeline run` first."
            )
