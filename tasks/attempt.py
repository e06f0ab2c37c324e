"""One attempt of a call in a gang, from the start of its agents until nobody of it is left."""

import json
import logging
import select
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from sae.errors import PipelineError, StopRequested, TransientError
from sae.pipeline_config import NodeConfig
from sae.progress import Progress, silent
from tasks.members import NodeAgent, Rank
from tasks.process import STOP_SECONDS, WorkerCrash, as_error, how_it_ended
from tasks.ray_gang import RayGang

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 5.0
"""How long the others are heard after the first rank has failed: what they say may be the cause."""
EXIT_SECONDS = 5.0
"""How long ranks that have said how they ended may take to be gone."""
HANG_UP_SECONDS = 2.0
"""How long an agent may take to end its ranks and itself."""
GONE_SECONDS = 10.0
"""How long the kernel may take to end what is killed."""


class Attempt:
    """A gang, from its start to its end.

    Args:
        name: of the call, for messages.
        nodes: machines, with equally many ranks each.
        progress: rank 0's.
        collective_seconds: how long ranks may wait for each other.
        heartbeat_seconds: how long one may show no progress.
        ray: the cluster that has the ranks' machines. None: they are `nodes`.
    """

    def __init__(
        self,
        name: str,
        nodes: Sequence[NodeConfig],
        n_ranks: int,
        progress: Progress,
        *,
        collective_seconds: float,
        heartbeat_seconds: float,
        ray: RayGang | None = None,
    ) -> None:
        self._name, self._nodes, self._progress, self._ray = name, nodes, progress, ray
        self._collective_seconds, self._heartbeat_seconds = collective_seconds, heartbeat_seconds
        self._patience = float("inf")
        """Until when ranks are waited for, once one has ended."""
        per_node, now = n_ranks // len(nodes), time.monotonic()
        where = [f"node {node.address}" if ray is None else f"Ray at {ray.address}" for node in nodes]
        self._ranks = [Rank(number, where[number // per_node], now) for number in range(n_ranks)]
        self._in_order: list[Rank] = []
        """Ranks as they ended: what goes wrong in one goes wrong in others later."""
        self._agents: list[NodeAgent] = []
        self._error: Exception | None = None
        """Of the gang as a whole."""
        self._asked_to_stop = False

    def start(self, request: str) -> None:
        """Start all agents. The first is told what to do, the others when it has said where to meet."""
        per_node = len(self._ranks) // len(self._nodes)
        self._orders = {
            "n_nodes": len(self._nodes),
            "n_ranks": per_node,
            "meet_at": str(self._nodes[0].address),
            "run_id": uuid.uuid4().hex,
            "request": request,
        }
        program = "tasks.agent"
        if self._ray is not None:
            program, self._orders["ray"] = "tasks.ray_agent", self._ray.model_dump()
        for number, node in enumerate(self._nodes):
            ranks = self._ranks[number * per_node : (number + 1) * per_node]
            self._agents.append(NodeAgent(node, ranks, program))
        self._order(0, port=0)

    def ask_to_stop(self) -> None:
        """Have every rank save and end."""
        self._asked_to_stop = True
        for agent in list(self._agents):
            agent.say(b"stop")

    def is_alive(self) -> bool:
        """Whether an agent is."""
        return any(agent.process.poll() is None for agent in list(self._agents))

    def end_group(self) -> None:
        """Have the agents kill their ranks, who may not die with them yet; then kill what is left."""
        for agent in list(self._agents):
            agent.hang_up()
        deadline = time.monotonic() + HANG_UP_SECONDS
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        for agent in list(self._agents):
            agent.kill()

    def follow(self, limit_seconds: float | None) -> None:
        """Hear what the ranks say until all have ended or a deadline has passed."""
        limit = time.monotonic() + limit_seconds if limit_seconds is not None else float("inf")
        while self._error is None and (waited_for := [rank for rank in self._ranks if not rank.ended]):
            wait_until = min(limit, self._patience, _heard_of_all(waited_for) + self._heartbeat_seconds)
            self._read(min(1.0, max(0.0, wait_until - time.monotonic())))
            now, waited_for = time.monotonic(), [rank for rank in waited_for if not rank.ended]
            if not waited_for:
                return
            if now >= limit:
                self._error = TransientError(
                    f"{self._name} took longer than {limit_seconds:g} s (execution.task_limit_seconds) and was killed"
                )
            elif now >= min(self._patience, _heard_of_all(waited_for) + self._heartbeat_seconds):
                for rank in sorted(waited_for, key=lambda rank: rank.heard):
                    rank.silent = True
                    self._lose(rank, f"said nothing for {now - rank.heard:.0f} s, the last thing {rank.doing}")

    def end(self) -> None:
        """Let ranks go that have said that they do, kill the rest, and wait until nobody is left."""
        self._progress = silent  # it may be what has failed
        if all(rank.reply is not None for rank in self._ranks):
            self._read_until(lambda agent: agent.done, EXIT_SECONDS)
        self.end_group()
        self._read_until(lambda agent: agent.at_end, GONE_SECONDS)
        for agent in self._agents:
            if not agent.at_end:
                logger.error("processes of node %s are still there after SIGKILL", agent.node.address)
            agent.close()

    def raise_how_it_ended(self) -> None:
        """Raises: as `tasks.gang.run_gang`; nothing when every rank is done."""
        replies = [(rank, rank.reply) for rank in self._in_order if rank.reply is not None]
        errors = [as_error(reply["error"]) for _, reply in replies if "error" in reply]
        for error in errors:
            if not error.retryable:
                raise error
        lost = [rank for rank in self._in_order if rank.lost is not None]
        if self._asked_to_stop and (lost or errors or self._error):
            raise next((error for error in errors if isinstance(error, StopRequested)), StopRequested("stopped"))
        if self._error is not None:
            raise self._error
        self._raise_lost([rank for rank in lost if not rank.silent])
        for rank, reply in replies:
            if "crash" in reply:
                raise WorkerCrash(
                    f"{self._name} failed in {rank.name} in a way that was not foreseen:\n{reply['crash']}"
                )
        self._raise_lost(lost)
        if errors:
            raise next((error for error in errors if isinstance(error, StopRequested)), errors[0])

    def _raise_lost(self, ranks: Sequence[Rank]) -> None:
        if ranks:
            more = f", and {len(ranks) - 1} more" if len(ranks) > 1 else ""
            raise TransientError(
                f"{ranks[0].name} of {self._name} {ranks[0].lost}{more}. All were ended; what they had committed and "
                f"their checkpoints are kept."
            )

    def _order(self, number: int, port: int) -> None:
        address = str(self._nodes[number].address)
        orders = self._orders | {"node": number, "address": address, "port": port}
        self._agents[number].say(json.dumps(orders).encode())
        if self._asked_to_stop:  # before this agent was there to be told
            raise StopRequested("stopped")

    def _read(self, seconds: float) -> None:
        """Hear what has come, or comes in that time."""
        ready = self._wait_for_output(seconds)
        for agent in ready:
            for sender, message in agent.read():
                if sender == "agent":
                    self._hear_agent(agent, message)
                elif sender:
                    self._hear(self._ranks[int(sender)], message)
                else:
                    logger.info("%s", message["print"])
        for agent in self._agents:
            if agent.process.poll() is not None and (agent.at_end or agent not in ready):
                for rank in agent.ranks:
                    self._lose(rank, f"ended with its agent, which {how_it_ended(agent.process.returncode)}")

    def _read_until(self, condition: Callable[[NodeAgent], bool], seconds: float) -> None:
        """What all agents come to, or so long."""
        deadline = time.monotonic() + seconds
        while not all(map(condition, self._agents)) and time.monotonic() < deadline:
            self._read(0.1)

    def _wait_for_output(self, seconds: float) -> list[NodeAgent]:
        """Those that have something to be read, or come to their end, in that time."""
        poll = select.poll()  # select() ends at descriptor 1024
        by_output = {agent.output: agent for agent in self._agents if not agent.at_end}
        for output in by_output:
            poll.register(output, select.POLLIN)
        return [by_output[output] for output, _ in poll.poll(seconds * 1000)]

    def _hear(self, rank: Rank, message: dict[str, Any]) -> None:
        rank.heard = time.monotonic()
        if "progress" in message:
            done, total, unit, note = message["progress"]
            rank.doing = f"at {done:,} of {total:,} {unit}"
            if rank.number == 0:
                self._progress(done, total, unit, note)
        elif "log" in message:
            source, level, text = message["log"]
            logging.getLogger(source).log(level, "%s%s", f"rank {rank.number}: " if rank.number else "", text)
        elif "doing" in message:
            rank.doing, rank.where = message["doing"], message.get("where", rank.where)
        elif not rank.ended:
            rank.reply = message
            self._note_end(rank)

    def _hear_agent(self, agent: NodeAgent, message: dict[str, Any]) -> None:
        where = f"node {agent.node.address}"
        if "port" in message:
            for number in range(1, len(self._agents)):
                self._order(number, message["port"])
        elif "ended" in message:
            number, status = message["ended"]
            self._lose(self._ranks[number], how_it_ended(status) if status is not None else "ended without a word")
        elif "lost" in message:
            number, how = message["lost"]
            self._lose(self._ranks[number], how)
        elif "done" in message:
            agent.done = True
        elif "crash" in message:
            self._error = WorkerCrash(
                f"the agent of {where} failed in a way that was not foreseen:\n{message['crash']}"
            )
        elif "error" in message:
            error: PipelineError = as_error(message["error"])
            if not error.retryable or self._ray is not None:
                self._error = error
            for rank in agent.ranks:
                self._lose(rank, f"ended with its agent: {error}")

    def _lose(self, rank: Rank, how: str) -> None:
        if not rank.ended:
            rank.lost = how
            self._note_end(rank)

    def _note_end(self, rank: Rank) -> None:
        self._in_order.append(rank)
        seconds = LAST_WORDS_SECONDS
        if rank.reply and "done" in rank.reply:  # the others are at most a collective behind
            seconds = self._collective_seconds
        elif rank.reply and rank.reply.get("error", {}).get("type") == "StopRequested":
            seconds = STOP_SECONDS
        self._patience = min(self._patience, time.monotonic() + seconds)


def _heard_of_all(ranks: Sequence[Rank]) -> float:
    """Since when not all have been heard of."""
    return min(rank.heard for rank in ranks)
