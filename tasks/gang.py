"""Library calls in many processes that share the work: started, killed and tried again all together.

A gang has an agent on every node (`tasks.agent`), which starts the node's ranks (`tasks.rank`). What they have to say
comes through one pipe per node, which the caller's thread reads (`tasks.attempt`). How a call ended is decided by what
the ranks said, never by exit statuses. A rank that is lost, or says nothing for too long, costs all of them: the rest
is killed, and the error is one that is worth a retry, which starts another gang at another meeting place.

On a Ray cluster Ray Train has the part of the agents: `tasks.ray_agent` is its only one here, and `tasks.ray_gang` what
it runs on the cluster's machines.

Nobody is left behind. Agents die with this process and when their stdin ends, ranks die with their agent, and a call
returns when no process holds a node's pipe any more.
"""

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

from pydantic_core import to_jsonable_python

from sae.config import DeviceChoice, FrozenConfig
from sae.pipeline_config import NodeConfig
from sae.progress import Progress, silent
from sae.train.config import MeshConfig
from tasks.attempt import Attempt
from tasks.process import while_busy
from tasks.rank import pack
from tasks.ray_gang import RayGang

THIS_MACHINE = NodeConfig(address=IPv4Address("127.0.0.1"))


class GangConfig(FrozenConfig):
    """The processes that share a call."""

    mesh: MeshConfig
    nodes: tuple[NodeConfig, ...] = ()
    """Machines, with equally many ranks each. Empty: this one."""
    ray: RayGang | None = None
    """The cluster whose machines have the ranks, by Ray Train. None: the nodes have."""
    threads: int | None = None
    """Of every rank. None: torch's default."""
    device: DeviceChoice = "cpu"
    """A GPU for every rank, or none for any."""
    collective_timeout_seconds: float = 300.0
    """A rank that waits longer for another fails."""
    heartbeat_timeout_seconds: float = 600.0
    """A rank that shows no progress for longer is lost."""


def run_gang(
    function: Callable[..., Any],
    root: str,
    arguments: dict[str, Any],
    gang: GangConfig,
    *,
    limit_seconds: float | None = None,
    progress: Progress = silent,
) -> None:
    """Call `function(Storage(root), **arguments, shared=..., progress=...)` in every process of a mesh, and wait.

    Args:
        function: as for `run_in_worker`. `shared` is its place in the mesh; where `progress` raises StopRequested, it
            agrees with the other ranks to end.
        limit_seconds: wall-clock limit.
        progress: rank 0's.

    Raises:
        PipelineError: what a rank raised, of the same type.
        TransientError: a rank or an agent was lost, hung, or took too long.
        WorkerCrash: a rank failed in a way that was not foreseen.
        StopRequested: SIGTERM came to a rank or an agent, or workers are being stopped.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    request = {
        "function": name,
        "root": root,
        "arguments": to_jsonable_python(arguments),
        "threads": gang.threads,
        "device": gang.device,
        "mesh": gang.mesh.model_dump(),
        "collective_timeout_seconds": gang.collective_timeout_seconds,
    }
    attempt = Attempt(
        name,
        gang.nodes or (THIS_MACHINE,),
        gang.mesh.world,
        progress,
        collective_seconds=gang.collective_timeout_seconds,
        heartbeat_seconds=gang.heartbeat_timeout_seconds,
        ray=gang.ray,
    )
    with while_busy(attempt):
        try:
            attempt.start(pack(request))
            attempt.follow(limit_seconds)
        finally:
            attempt.end()
    attempt.raise_how_it_ended()
