"""What runs on a Ray cluster for a gang: a worker of Ray Train for every rank, and an actor that they speak through.

A worker starts its rank as a child of its own, `tasks.rank`, like an agent of torchrun: the same program on the same
mesh makes the same bytes. What ranks say goes to `tasks.ray_agent` through the actor, and what they are told comes back
as its answers, so all of it travels inside Ray, which asks for the cluster's token.

A rank dies with its worker, and a worker with the process of `tasks.ray_agent`, whose Ray job it belongs to.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from sae.config import FrozenConfig
from sae.pipeline_config import RayRequest
from tasks.frames import frames
from tasks.network import of_interface
from tasks.process import environment_of_children
from tasks.rank import AGENT, REQUEST
from tasks.tied import tied_command

STOP, END = "stop", "end"
"""What ranks are told: to save and end; to end now."""
TALK_SECONDS = 1.0
"""Between two times that a rank hands in what it says, and asks what to do."""
AT_ONCE = 1 << 20
"""Bytes that are handed in without waiting for more."""


class RayGang(FrozenConfig):
    """Where the ranks of a gang come from."""

    address: str
    """The cluster's head, HOST:PORT."""
    request: RayRequest
    """What every rank has, on one machine."""
    resource_timeout_seconds: float
    """How long the cluster may have no room for all of them."""
    import_path: str | None = None
    """PYTHONPATH of the ranks' workers. None: what their machines have."""


class Post:
    """An actor: ranks hand in what they say, and their agent collects it. It lives as long as the agent."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._order = ""
        self._news = asyncio.Event()

    async def hand_in(self, lines: bytes) -> str:
        """Take a rank's lines, whole ones. Returns: what it is to do, or nothing."""
        if lines:
            self._lines.append(lines)
            self._news.set()
        return self._order

    async def collect(self, seconds: float) -> list[bytes]:
        """What has been handed in, or is in that time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()
        lines, self._lines = self._lines, []
        return lines

    async def tell(self, order: str) -> None:
        """Tell every rank, as soon as it asks."""
        self._order = order


def run_rank(orders: dict[str, Any]) -> None:
    """Start this worker's rank, let it speak to the agent and obey it, and wait for the end of all.

    Args:
        orders: `post`, the actor; `request`, for `tasks.rank`; `run_id`.
    """
    import ray
    from ray.train import collective, get_context

    context, address = get_context(), ray.util.get_node_ip_address()
    rank = context.get_world_rank()
    store = _open_store(address) if rank == 0 else None
    meet_at, port = collective.broadcast_from_rank_zero((address, store.port if store is not None else 0))
    environment = {
        AGENT: str(os.getpid()),
        REQUEST: orders["request"],
        "RANK": str(rank),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "GROUP_RANK": str(context.get_node_rank()),
        "MASTER_ADDR": meet_at,
        "MASTER_PORT": str(port),
        # What torchrun tells ranks: the store is there, and not to be opened by rank 0 on all addresses.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": orders["run_id"],
    }
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        tied_command(sys.executable, "-P", "-m", "tasks.rank"),  # to this thread, which waits for it
        stdin=subprocess.DEVNULL,
        stdout=write_end,
        env=of_interface(address) | environment_of_children() | environment,
        start_new_session=True,
    )
    os.close(write_end)
    hello = frames(str(rank), doing="as it was started", where=f"node {address}")
    try:
        by_itself = _follow(process, read_end, b"".join(hello), rank, orders["post"])
    finally:
        os.close(read_end)
        _end(process)
    if by_itself:
        collective.barrier()  # the others may need the store as long as they are there
    del store


def _open_store(address: str) -> Any:
    """The store at which ranks meet, on this address alone."""
    from torch.distributed import TCPStore

    from sae.train.mesh import JOIN_SECONDS

    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=JOIN_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill what is left of a rank and of what it has started. Returns: its exit status."""
    if process.returncode is None:  # else its number may be somebody else's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _follow(process: subprocess.Popen[bytes], output: int, lines: bytes, rank: int, post: Any) -> bool:
    """Hand in what a rank says until it has ended, and do to it what the answers say.

    Args:
        lines: to be handed in first.

    Returns: whether it has ended, or else is to be ended now.
    """
    import ray

    readable = select.poll()
    readable.register(output, select.POLLIN)
    asked_to_stop = at_end = False
    while True:
        if at_end:  # it alone had the pipe, so it is on its way out
            lines += b"\n" if lines and not lines.endswith(b"\n") else b""
            lines += b"".join(frames("agent", ended=[rank, _end(process)]))
        whole, newline, rest = lines.rpartition(b"\n")
        order = ray.get(post.hand_in.remote(whole + newline))
        if at_end or order == END:
            return at_end
        if order == STOP and not asked_to_stop:
            asked_to_stop = True
            process.terminate()
        lines = rest
        until = time.monotonic() + TALK_SECONDS
        while not at_end and len(lines) < AT_ONCE and (left := until - time.monotonic()) > 0:
            if readable.poll(left * 1000):
                block = os.read(output, 1 << 16)
                lines, at_end = lines + block, not block
