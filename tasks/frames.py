"""Messages of many processes on one pipe: they arrive whole and in order, however the processes' writes fall.

The kernel puts writes of up to PIPE_BUF bytes into a pipe undivided, so a message travels in frames of that size, each
a line: who it is from, whether more follows, a piece of JSON. Lines that are no frames are somebody's print.
"""

import json
import os
import select
import threading
from collections.abc import Sequence
from typing import Any

MARK = "\x1e"
"""A control character, so no print begins with it."""
ROOM = select.PIPE_BUF - 64
"""Bytes of JSON in a frame."""


class FrameWriter:
    """Writes to the pipe, from any thread.

    Args:
        sender: who writes, a short word.
    """

    def __init__(self, descriptor: int, sender: str) -> None:
        self._descriptor, self._sender, self._lock = descriptor, sender, threading.Lock()

    def send(self, **message: Any) -> None:
        """Write one message, JSON values. The process ends when nobody is there to read it."""
        self.pass_on(frames(self._sender, **message))

    def pass_on(self, lines: Sequence[bytes]) -> None:
        """Write frames, or lines that are none, each of at most PIPE_BUF bytes."""
        with self._lock:
            for line in lines:
                try:
                    os.write(self._descriptor, line)
                except BrokenPipeError:
                    os._exit(1)


def frames(sender: str, **message: Any) -> list[bytes]:
    """One message, JSON values, as lines."""
    text = json.dumps(message)  # ASCII: a byte a character
    return [
        f"{MARK}{sender}{'+' if start + ROOM < len(text) else '.'}{text[start : start + ROOM]}\n".encode()
        for start in range(0, len(text), ROOM)
    ]


class FrameReader:
    """Puts messages together from what is read of the pipe."""

    def __init__(self) -> None:
        self._line = b""
        self._pieces: dict[str, str] = {}

    def feed(self, block: bytes) -> list[tuple[str, dict[str, Any]]]:
        """Take what was read. Returns: every message that it completes, (sender, message); ("", {"print": line}) for
        a line that is no frame."""
        *lines, self._line = (self._line + block).split(b"\n")
        complete = []
        for line in lines:
            text = line.decode(errors="replace")
            end = next((place for place, char in enumerate(text) if char in "+."), 0)
            if not text.startswith(MARK) or not end:
                complete.append(("", {"print": text}))
                continue
            sender, piece = text[1:end], text[end + 1 :]
            self._pieces[sender] = self._pieces.get(sender, "") + piece
            if text[end] == ".":
                complete.append((sender, json.loads(self._pieces.pop(sender))))
        return complete
