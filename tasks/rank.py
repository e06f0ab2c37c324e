"""One process of a gang: joins the mesh, calls the function that all ranks call, says how that ended.

Started by `tasks.agent`. What it says travels in frames on stdout to the launcher, `tasks.gang`. It dies with its
agent, and when nobody reads what it says. SIGTERM asks the work to end at its next progress call, of all ranks: the
function tells the others (`Collectives.agree`).
"""

import base64
import contextlib
import importlib
import json
import os
import zlib
from typing import Any

from sae.errors import ConfigError
from tasks.frames import FrameWriter
from tasks.tied import tie_to, watch
from tasks.worker import PROGRESS_SECONDS, Stop, answer, call, forward_logs, progress_to

AGENT, REQUEST = "SAE_GANG_AGENT", "SAE_GANG_REQUEST"
"""Environment variables: the agent's pid, and what is asked for."""
MAX_REQUEST = 50_000
"""Bytes: a pipe that nobody reads yet takes as many and some more."""
HEARTBEAT_SECONDS = 1.0
"""Between the signs of life of ranks whose progress nobody looks at."""


def pack(request: dict[str, Any]) -> str:
    """A request as the value of an environment variable, which may have 128 KiB: the specs of a sweep are much alike.

    Raises: ConfigError when it does not fit.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(request).encode())).decode()
    if len(packed) > MAX_REQUEST:
        raise ConfigError(
            f"{request['function']}: {len(packed):,} bytes of arguments, packed, are more than the processes of a mesh "
            f"can be started with ({MAX_REQUEST:,}). Train fewer SAEs at once."
        )
    return packed


def main(agent: int, request: dict[str, Any]) -> None:
    """Do a rank's share of a request, and end the process."""
    tie_to(agent)
    watch(agent)
    rank = int(os.environ["RANK"])
    replies = FrameWriter(os.dup(1), str(rank))
    os.dup2(2, 1)  # what the function prints is not for the launcher
    stop = Stop()
    stop.busy = True
    replies.send(doing="as it was started")
    forward_logs(replies)
    progress = progress_to(replies, stop, PROGRESS_SECONDS if rank == 0 else HEARTBEAT_SECONDS)
    with contextlib.ExitStack() as joined:

        def work() -> None:
            from sae.device import choose_rank_device
            from sae.train.config import MeshConfig
            from sae.train.mesh import connect

            importlib.import_module(request["function"].partition(":")[0])  # not while others wait in a collective
            on_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
            device = choose_rank_device(request["device"], *on_node)
            mesh = MeshConfig.model_validate(request["mesh"])
            shared = joined.enter_context(connect(mesh, request["collective_timeout_seconds"], device))
            replies.send(doing="as it had joined the others")
            call(request, progress, device, shared=shared)

        # Said before the mesh is left: that makes others fail, and the first failure that is heard of is the cause.
        replies.send(**answer(work))
    # With status 0 whatever was said: for another torchrun's agent would end the ranks that are still saving.
    os._exit(0)


if __name__ == "__main__":
    main(int(os.environ[AGENT]), json.loads(zlib.decompress(base64.b64decode(os.environ[REQUEST]))))
