"""Tasks that Ray runs, with prefect-ray.

Ray decides where a task runs: in a placement group with what its stage asks for, on one machine. So it is known whether
Ray has had room for it.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefect import Task
from prefect.utilities.callables import get_call_parameters

from sae.errors import StopRequested, TransientError
from sae.pipeline_config import RayConfig, RayRequest
from tasks.process import STOP_SECONDS, WorkerCrash
from tasks.ray_gang import RayGang
from tasks.ray_requests import amount, bundle, count_places, told
from tasks.tied import with_import_path

LOCAL = "local"
"""The address of a cluster that is this machine, for the time of the run."""
LOOK_SECONDS = 1.0
"""Between looks at the machines of tasks at work."""
WAIT_SECONDS = 0.1
"""Between looks for a machine, or for a place that another task has left."""
FREE_SECONDS = 60.0
"""How long places that no task has used are kept for the next."""


class _Place(NamedTuple):
    """Where a task runs: a placement group, which has a machine, or waits for one."""

    group: Any
    request: RayRequest


class _Task(NamedTuple):
    """A task that Ray has."""

    place: _Place
    name: str


class RayFuture:
    """A task that Ray runs."""

    def __init__(self, cluster: "RayTasks", future: Any, name: str) -> None:
        self._cluster, self._future, self._name = cluster, future, name

    def result(self) -> list[str]:
        """Wait for it.

        Returns: what the task returns.
        Raises: what the task raises; TransientError when its Ray worker was lost again and again, or no machine had
            room for it; WorkerCrash when it failed in a way that was not foreseen.
        """
        import ray

        self._cluster.wait_for(self._future.wrapped_future)
        try:
            return list(self._future.result())
        except ray.exceptions.RayTaskError as err:
            raise WorkerCrash(f"{self._name} failed on Ray in a way that was not foreseen:\n{err}") from err
        except ray.exceptions.TaskCancelledError as err:
            raise StopRequested(f"{self._name} was cancelled") from err
        except ray.exceptions.RayError as err:
            reason = str(err).partition("\n")[0]
            raise TransientError(
                f"the Ray worker of {self._name} was lost, and so were those that tried again (execution.retries): "
                f"{type(err).__name__}: {reason}. What it had committed and its checkpoints are kept."
            ) from err


class RayTasks:
    """A cluster that this process is connected to.

    A place that has become free is used for the next task, because Ray ends its workers with their place, and they take
    seconds to start. So a task is handed over when it has a place, and the others wait here.

    Args:
        retries: how often a task is begun again whose Ray worker was lost.
    """

    def __init__(self, config: RayConfig, retries: int) -> None:
        from prefect_ray import RayTaskRunner

        self._config, self._retries = config, retries
        self._runner = RayTaskRunner(address=config.address)
        self._tasks: dict[Any, _Task] = {}
        """At work, by their references."""
        self._free: list[_Place] = []
        self._free_since = self._served = time.monotonic()
        """When a place was last used; when a task was last known to have one, or there was none that wanted one."""

    def submit(self, task: Task[..., list[str]], parameters: dict[str, Any], stage: str) -> RayFuture:
        """Have Ray run a task, with what its stage asks for, as soon as a machine has that.

        Raises: TransientError when no machine has had room for it for too long, with no task of this run at work.
        """
        from prefect_ray.context import remote_options
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = self._take_place(stage, task.name)
        with remote_options(
            num_cpus=place.request.num_cpus,
            num_gpus=place.request.num_gpus,
            max_retries=self._retries,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=place.group),
        ):
            future = self._runner.submit(task, get_call_parameters(task.fn, (), parameters))
        self._tasks[future.wrapped_future] = _Task(place, task.name)
        return RayFuture(self, future, task.name)

    def request(self, stage: str) -> RayRequest:
        """What a task of a stage asks for."""
        request: RayRequest = getattr(self._config.requests, stage)
        return request

    def make_room(self) -> None:
        """Give up places that tasks have left: a gang needs others."""
        self._look(0)
        self._give_up(self._free)

    def gang(self, stage: str) -> RayGang:
        """Where the ranks of a gang come from that shares a task of a stage."""
        import ray

        return RayGang(
            address=ray.get_runtime_context().gcs_address,
            request=self.request(stage),
            resource_timeout_seconds=self._config.resource_timeout_seconds,
            import_path=import_path(self._config),
        )

    def count_gangs(self, stage: str, n_ranks: int) -> int:
        """How many gangs of a stage the cluster has room for at once, one at least."""
        return max(1, count_places(self.request(stage), machines()) // n_ranks)

    def wait_for(self, reference: Any) -> None:
        """Until a task has ended.

        Raises: TransientError when machines were lost, and no other has had room for what they did for too long.
        """
        while reference in self._tasks:
            self._look(LOOK_SECONDS)
            if self._free and time.monotonic() - self._free_since > FREE_SECONDS:
                self._give_up(self._free)
            if any(_has_machine(task.place) for task in self._tasks.values()):
                self._served = time.monotonic()
            elif self._tasks:
                task = next(iter(self._tasks.values()))
                self._raise_if_forgotten(task.place.request, task.name)

    def cancel(self) -> None:
        """End what Ray still has; tasks at work are asked to save first."""
        import ray

        if self._tasks:
            references = list(self._tasks)
            for reference in references:
                ray.cancel(reference)
            ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)
        self._give_up([*self._free, *(task.place for task in self._tasks.values())])
        self._tasks.clear()
        self._free.clear()

    def __enter__(self) -> "RayTasks":
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cancel()
        self._runner.__exit__(*error)

    def _take_place(self, stage: str, name: str) -> _Place:
        from ray.util import placement_group

        request = self.request(stage)
        self._look(0)
        self._give_up([place for place in self._free if place.request != request])
        asked: _Place | None = None
        self._served = time.monotonic()
        try:
            while not self._free:
                asked = asked or _Place(placement_group([bundle(request)]), request)
                if _has_machine(asked):
                    taken, asked = asked, None
                    return taken
                if self._look(0) or self._tasks:
                    self._served = time.monotonic()
                self._raise_if_forgotten(request, name)
                time.sleep(WAIT_SECONDS)
        finally:
            if asked is not None:
                self._give_up([asked])
        return self._free.pop()

    def _look(self, seconds: float) -> bool:
        """Whether tasks have ended, or do in that time."""
        import ray

        if not self._tasks:
            return False
        try:
            ended, _ = ray.wait(list(self._tasks), timeout=seconds)
        except SystemError as err:  # how what a signal's handler raises leaves Ray's C code
            raise err.__cause__ or err from None
        for reference in ended:
            self._free.append(self._tasks.pop(reference).place)
            self._free_since = time.monotonic()
        return bool(ended)

    def _give_up(self, places: Sequence[_Place]) -> None:
        from ray.util import remove_placement_group

        for place in list(places):
            remove_placement_group(place.group)
            if place in self._free:
                self._free.remove(place)

    def _raise_if_forgotten(self, request: RayRequest, name: str) -> None:
        import ray

        if time.monotonic() - self._served > self._config.resource_timeout_seconds:
            raise TransientError(
                f"no machine of the Ray cluster at {self._config.address} has had room for {name} for "
                f"{self._config.resource_timeout_seconds:g} s (execution.ray.resource_timeout_seconds): it asks for "
                f"{told(request)} on one machine, and {amount(ray.available_resources())} are free in all. Wait for "
                f"who has them, or ask for less (execution.ray.requests)."
            )


def import_path(config: RayConfig) -> str | None:
    """PYTHONPATH of what a run starts on a cluster. None: the machines have this package by themselves."""
    return with_import_path(dict(os.environ))["PYTHONPATH"] if config.address == LOCAL else None


def machines() -> dict[str, dict[str, float]]:
    """Of the cluster, by their addresses: what each has in all, idle or not."""
    import ray

    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _has_machine(place: _Place) -> bool:
    from ray.util import placement_group_table

    return bool(placement_group_table(place.group)["state"] == "CREATED")
