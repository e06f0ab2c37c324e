"""Processes as /proc shows them, and waiting for what they do."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether it is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def marked(variable: str, value: str, command: str = "") -> list[int]:
    """Living processes with this in their environment, which all that they start have too, whoever their parents are.

    Args:
        command: what their command lines hold.
    """
    found, mark = [], f"{variable}={value}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # At the end of the environment, too, there is a zero byte.
            if mark in (folder / "environ").read_bytes() and command in _command(folder) and is_alive(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def in_use(path: str) -> bool:
    """Whether a living process has the file mapped or open."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path in (folder / "maps").read_text():
                return True
            for descriptor in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) == path:
                        return True
    return False


def _command(folder: Path) -> str:
    return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
