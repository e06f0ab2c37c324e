"""The one agent of a gang on a Ray cluster: has Ray Train run the ranks, and passes on what they and the launcher say.

Started by `tasks.gang` on the machine of the run, and obeys as `tasks.agent` does: orders come on stdin, a line of JSON
and later a line `stop` perhaps; when stdin ends, so does everything here. It has a Ray job of its own, and Ray ends
with a job all that belongs to it: whatever kills this process ends the ranks.

Ray Train makes the placement group, starts a worker for every rank (`tasks.ray_gang`), gives out ranks and GPUs, and
ends all workers when one is lost. It restarts nothing, because the task that waits for the gang is tried again.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from sae.errors import TransientError
from sae.pipeline_config import RayRequest
from tasks.frames import FrameWriter
from tasks.ray_gang import END, STOP, Post, run_rank
from tasks.ray_requests import bundle, told
from tasks.worker import answer

COLLECT_SECONDS = 1.0
"""How long the actor keeps this process waiting for what ranks say."""
END_SECONDS = 1.5
"""How long ranks that are told to end now may take, before Ray ends their workers."""
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Ray Train's, in this process's environment: it looks every second for lost workers, and measures, shows and moves
nothing."""


class _Gang:
    """The ranks, from this side."""

    def __init__(self, orders: dict[str, Any], replies: FrameWriter, output: int) -> None:
        self._orders, self._replies = orders, replies
        self._of_ranks = [FrameWriter(output, str(number)) for number in range(orders["n_ranks"])]
        self._post: Any = None
        self._heard = threading.Event()
        """Set when a rank has spoken."""
        self._over = threading.Event()
        """Set when Ray Train has ended, and no rank has anything left to say."""

    def run(self) -> None:
        """Have Ray Train run all ranks until they have ended.

        Raises: TransientError when there is no room for them, no cluster, or Ray loses what belongs to this process.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = self._orders["ray"]
        request = RayRequest.model_validate(where["request"])
        os.environ.update(SETTINGS)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(where["resource_timeout_seconds"])
        variables = {"PYTHONPATH": where["import_path"]} if where["import_path"] else {}
        try:
            context = ray.init(
                where["address"],
                namespace="sae-pipeline",
                logging_level=logging.ERROR,
                runtime_env={"env_vars": variables},
            )
            here = ray.get_runtime_context().get_node_id()
            only_here = NodeAffinitySchedulingStrategy(here, soft=False)
            post = ray.remote(num_cpus=0, scheduling_strategy=only_here)(Post).remote()
            ray.get(post.tell.remote(""))
        except Exception as err:
            raise TransientError(f"Ray at {where['address']} refuses: {type(err).__name__}: {err}") from err
        self._post = post
        # Instead of Ray's own, which ends the process.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self.ask_to_stop, daemon=True).start())
        passing_on = threading.Thread(target=self._pass_on, daemon=True, name="post")
        passing_on.start()
        try:
            failures = self._train(request, context.address_info["session_dir"])
        finally:
            self._over.set()
            passing_on.join()
            ray.shutdown()
        self._tell_losses(failures)

    def ask_to_stop(self) -> None:
        """Have the ranks save and end; those that do not run yet never will."""
        import ray

        if not self._heard.is_set():
            os._exit(0)
        if not self._over.is_set():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._post.tell.remote(STOP))

    def end(self) -> None:
        """End everything."""
        if self._heard.is_set() and not self._over.is_set():
            self._post.tell.remote(END)
            self._over.wait(END_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    def _train(self, request: RayRequest, folder: str) -> Mapping[int, Exception]:
        """Returns: why ranks were lost."""
        import ray
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

        wanted = {name: self._orders[name] for name in ("request", "run_id")}
        trainer = _trainer_class()(
            run_rank,
            train_loop_config=wanted | {"post": self._post},
            scaling_config=ScalingConfig(
                num_workers=len(self._of_ranks),
                use_gpu=request.num_gpus > 0,
                resources_per_worker=bundle(request),
                placement_strategy="PACK",
            ),
            run_config=RunConfig(
                name=self._orders["run_id"],
                storage_path=f"{folder}/gangs",  # nothing is stored there but a mark that it can be
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # what goes wrong comes as an error
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as err:
            failures: Mapping[int, Exception] = err.worker_failures
            return failures
        except ray.exceptions.RayError as err:
            raise TransientError(f"what Ray Train looks after the gang with was lost: {err}") from err
        except ControllerError as err:
            failure = err.controller_failure
            if type(failure).__name__ == "WorkerGroupStartupTimeoutError":
                seconds = self._orders["ray"]["resource_timeout_seconds"]
                raise TransientError(
                    f"the Ray cluster at {self._orders['ray']['address']} has had no room for {len(self._of_ranks)} "
                    f"processes with {told(request)} each for {seconds:g} s (execution.ray.resource_timeout_seconds). "
                    f"Wait for who has it, or ask for less (execution.ray.requests, execution.mesh)."
                ) from err
            raise TransientError(f"Ray Train failed: {type(failure).__name__}: {failure}") from err
        return {}

    def _tell_losses(self, failures: Mapping[int, Exception]) -> None:
        for rank, failure in failures.items():
            if type(failure).__name__ == "UserExceptionWithTraceback":  # raised by `run_rank`
                self._of_ranks[rank].send(crash=str(failure))
                continue
            cause = getattr(failure, "health_check_failure", failure)
            reason = str(cause).strip().partition("\n")[0]
            self._replies.send(lost=[rank, f"was lost with its Ray worker ({type(cause).__name__}: {reason})"])
        if failures:
            for rank in range(len(self._of_ranks)):
                self._replies.send(lost=[rank, "was ended with the others"])  # unless more is known of it

    def _pass_on(self) -> None:
        """What ranks say, to the launcher; before there are any, that they are waited for."""
        import ray

        while True:
            over = self._over.is_set()  # asked before the last look
            try:
                blocks = ray.get(self._post.collect.remote(0.0 if over else COLLECT_SECONDS))
            except ray.exceptions.RayError:
                if not over:
                    os._exit(1)
                return
            for block in blocks:
                self._heard.set()
                self._replies.pass_on(block.splitlines(keepends=True))
            if over:
                return
            if not self._heard.is_set():
                for rank in self._of_ranks:
                    rank.send(doing="before Ray had room for it and had started it")


def _trainer_class() -> Any:
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class OwnMeeting(Backend):
        """The ranks meet by themselves. As with torch's own backend they see all GPUs of the ranks on their machine."""

        share_cuda_visible_devices = True

    class OwnMeetingConfig(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return OwnMeeting

    class Trainer(DataParallelTrainer):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, backend_config=OwnMeetingConfig(), **named)

        def _create_default_callbacks(self) -> list[Any]:
            # The cleaner outlives this process and asks the dashboard, which may not be there, for ever whether it may
            # end. It is not needed: with a job Ray removes its placement groups.
            found = super()._create_default_callbacks()
            return [each for each in found if type(each).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def main() -> None:
    """Run a gang; then stay until the launcher hangs up."""
    logging.disable()  # what goes wrong is told by the launcher
    output = os.dup(1)
    os.dup2(2, 1)  # Ray prints what workers print
    replies = FrameWriter(output, "agent")
    line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]
    if not line.startswith(b"{"):  # stopped, or alone, before there was anything to do
        os._exit(0)
    orders = json.loads(line)
    gang = _Gang(orders, replies, output)
    threading.Thread(target=_look_after, args=(gang,), daemon=True, name="lifeline").start()
    replies.send(**answer(gang.run))
    threading.Event().wait()


def _look_after(gang: _Gang) -> None:
    """Obey the launcher, and end with it."""
    while os.read(0, 1024):
        gang.ask_to_stop()
    gang.end()


if __name__ == "__main__":
    main()
