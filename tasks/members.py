"""Who makes up a gang: its ranks, as far as they have been heard of, and the process that looks after each node."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae.pipeline_config import NodeConfig
from tasks.frames import FrameReader
from tasks.process import environment_of_children, stderr_of_children
from tasks.tied import tied_command


@dataclass
class Rank:
    """What is known of a rank.

    Attributes:
        where: its machine, for messages.
        heard: when it was last heard of, by `time.monotonic()`.
        doing: what, then.
        reply: how it says that it ended.
        lost: how it ended, or went silent, without saying so.
        silent: it may be alive; others may have kept it waiting.
    """

    number: int
    where: str
    heard: float
    doing: str = "before it was started"
    reply: dict[str, Any] | None = None
    lost: str | None = None
    silent: bool = False

    @property
    def ended(self) -> bool:
        """Whether it is not waited for any more."""
        return self.reply is not None or self.lost is not None

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.number} ({self.where})"


class NodeAgent:
    """The process that looks after a node: a process group of its own here, whatever it starts elsewhere.

    Args:
        program: a module; it understands what `tasks.agent` does.
    """

    def __init__(self, node: NodeConfig, ranks: Sequence[Rank], program: str = "tasks.agent") -> None:
        self.node, self.ranks = node, ranks
        self.process = subprocess.Popen(
            tied_command(*node.command, sys.executable, "-P", "-m", program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr_of_children(),
            env=environment_of_children(),
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdout
        self.output, self.frames = self.process.stdout.fileno(), FrameReader()
        self.done = self.at_end = False
        """Whether its ranks have ended, by its own word; whether no process has its pipe any more."""

    def say(self, line: bytes) -> None:
        """One line. That nobody reads it is noticed elsewhere."""
        assert self.process.stdin
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(line + b"\n")

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """The messages that have come; blocks while there is nothing."""
        block = os.read(self.output, 1 << 16)
        self.at_end = not block
        return self.frames.feed(block)

    def hang_up(self) -> None:
        """It ends when nobody speaks to it any more, its ranks first."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        """End its process group here, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for its end, and let go of its streams."""
        self.process.wait()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
