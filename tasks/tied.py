"""Processes tied to the one that started them: they die with it, whatever kills it.

`python -m tasks.tied PARENT_PID COMMAND...` ties itself and becomes the command, so programs that are not ours
(a Prefect server) can be tied too.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def tied_command(*command: str) -> list[str]:
    """`command` as one that dies with this process.

    Start it from a thread that lives as long as the process: the kernel means the thread by "parent".
    """
    return [sys.executable, "-P", "-m", "tasks.tied", str(os.getpid()), *command]


def with_import_path(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this checkout on the import path, wherever the child is started."""
    here = str(Path(__file__).resolve().parents[1])
    others = environment.get("PYTHONPATH")
    return environment | {"PYTHONPATH": f"{here}{os.pathsep}{others}" if others else here}


def tie_to(parent: int) -> None:
    """Make this process die when process `parent`, which started it, does.

    On Linux the kernel sees to it, so it works in blocked C code too; elsewhere a thread looks every second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we were tied
        os._exit(1)


def watch(parent: int) -> None:
    """Look after the parent from a thread, where the kernel does not (and harmless where it does)."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True, name="parent").start()


if __name__ == "__main__":
    tie_to(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
