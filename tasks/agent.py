"""One node of a gang: torchrun's agent, which starts the node's ranks and looks after them.

Started by `tasks.gang`, on its machine or through a command that runs it on another. Orders come on stdin: a line of
JSON, and later a line `stop` perhaps; when stdin ends, so does everything here. What torchrun's command line cannot do:
the store at which ranks meet listens on the node's own address alone (torchrun's on all, for whoever comes) and on a
port that is found free, no folder is left in /tmp, and the death of a rank is reported at once.

There are no restarts. The store lives as long as one attempt, so no rank reads the addresses of one before.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from sae.errors import ConfigError, TransientError
from sae.train.mesh import JOIN_SECONDS
from tasks.frames import FrameWriter
from tasks.network import of_interface
from tasks.rank import AGENT, REQUEST
from tasks.tied import tied_command
from tasks.worker import answer

REACH_SECONDS = 45.0
"""Until an agent reaches the first one's store, which listens before it is told of: else the network is at fault."""


class _Meeting(RendezvousHandler):
    """All agents are known and have their numbers, so they only meet at node 0's store.

    Args:
        listener: node 0's socket, which listens already.
    """

    def __init__(self, orders: dict[str, Any], port: int, listener: socket.socket | None) -> None:
        self._orders, self._port, self._listener = orders, port, listener
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "gang"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        orders = self._orders
        self._store = TCPStore(
            orders["meet_at"],
            self._port,
            is_master=self._listener is not None,
            timeout=timedelta(seconds=REACH_SECONDS),
            wait_for_workers=False,
            master_listen_fd=self._listener.detach() if self._listener is not None else None,
        )
        self._store.set_timeout(timedelta(seconds=JOIN_SECONDS))
        where = RendezvousStoreInfo(orders["meet_at"], self._port)
        store = PrefixStore(orders["run_id"], self._store)
        return RendezvousInfo(store, orders["node"], orders["n_nodes"], where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return str(self._orders["run_id"])

    def shutdown(self) -> bool:
        return True


class _Agent(LocalElasticAgent):
    """Does not wait for other agents at the end: the launcher does."""

    def _exit_barrier(self) -> None:
        pass


class _NoFiles(LogsSpecs):
    """Ranks write to the streams of the agent."""

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=dict(nowhere), error_files=dict(nowhere))


def main() -> None:
    """Run this node's share of a gang; then stay, with a store that others may need, until the launcher kills it."""
    logging.disable()  # what torchrun tells is told by the launcher
    replies = FrameWriter(1, "agent")
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # ranks shall not hold it
    with open(lifeline, "rb", buffering=0, closefd=False) as stream:  # what follows the line stays in the pipe
        line = stream.readline()
    if not line.startswith(b"{"):  # stopped, or alone, before there was anything to do
        os._exit(0)
    orders = json.loads(line)

    def work() -> None:
        listener, port = None, orders["port"]
        if orders["node"] == 0:
            listener, port = _listen(orders["meet_at"])
            replies.send(port=port)
        os.environ[AGENT], os.environ[REQUEST] = str(os.getpid()), orders["request"]
        for name, value in of_interface(orders["address"]).items():
            os.environ.setdefault(name, value)
        spec = WorkerSpec(
            role="rank",
            local_world_size=orders["n_ranks"],
            entrypoint=sys.executable,
            args=tuple(tied_command(sys.executable, "-P", "-m", "tasks.rank")[1:]),  # tied before it imports torch
            rdzv_handler=_Meeting(orders, port, listener),
            max_restarts=0,
        )
        agent = _Agent(spec, _NoFiles())
        threading.Thread(target=_look_after, args=(agent, lifeline, replies), daemon=True, name="lifeline").start()
        try:
            with contextlib.suppress(SignalException):  # it has passed SIGTERM on, and its ranks have ended
                agent.run()
        except DistError as err:
            raise TransientError(f"{type(err).__name__}: {err}") from err

    replies.send(**answer(work))
    threading.Event().wait()


def _listen(address: str) -> tuple[socket.socket, int]:
    try:
        listener = socket.create_server((address, 0))
    except OSError as err:
        raise ConfigError(
            f"execution.nodes: the first node cannot listen on its address {address} ({err.strerror}). Give an address "
            f"that this node has and the others reach."
        ) from err
    return listener, listener.getsockname()[1]


def _look_after(agent: LocalElasticAgent, lifeline: int, replies: FrameWriter) -> None:
    """Obey the launcher, die with it, and tell it when a rank has ended."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    ranks: dict[int, tuple[int, int]] = {}
    """By pidfd: rank and pid."""
    looked = not hasattr(os, "pidfd_open")
    while True:
        workers = agent.get_worker_group().workers
        if not looked and all(worker.id for worker in workers):
            looked = True
            for worker in workers:
                try:
                    descriptor = os.pidfd_open(worker.id)
                except ProcessLookupError:
                    replies.send(ended=[worker.global_rank, None])
                    continue
                ranks[descriptor] = worker.global_rank, worker.id
                poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(None if looked else 50):
            if descriptor == lifeline:
                hung_up = not os.read(lifeline, 1024)
                for worker in agent.get_worker_group().workers:
                    if not worker.id:
                        os._exit(0)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.id, signal.SIGKILL if hung_up else signal.SIGTERM)
                if hung_up:  # by now no rank is left that was stopped before it was tied to this process
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                poll.unregister(descriptor)
                rank, pid = ranks[descriptor]
                replies.send(ended=[rank, _status(pid)])


def _status(pid: int) -> int | None:
    """As of `Popen.returncode`; None when torchrun's own look was quicker."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


if __name__ == "__main__":
    main()
