"""Library calls in worker processes: they can be killed at a deadline, lost without harm, and asked to stop.

A worker is started when it is first needed and kept for the next call, because importing torch takes seconds. It has
a process group of its own and dies with this process. What a call makes travels through the store; requests and
replies are lines of JSON.
"""

import atexit
import contextlib
import itertools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from pydantic_core import to_jsonable_python

from sae import errors
from sae.config import DeviceChoice
from sae.errors import DamagedError, PipelineError, StopRequested, TransientError
from sae.progress import Progress, silent
from tasks.tied import with_import_path

logger = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long a worker may take to save and end when it is asked to stop."""

READ_AT_START = ("AWS_", "CUDA_", "HF_", "OMP_", "TOKENIZERS_", "TRANSFORMERS_", "WANDB_")
"""Beginnings of the environment variables that the libraries in a worker read once: credentials, caches, threads, and
which GPUs it has."""
KEY_ENDINGS = ("_KEY", "_TOKEN")
"""Endings of those that hold keys, which a worker has from its start alone: they are written nowhere."""


class Busy(Protocol):
    """Processes at work."""

    def ask_to_stop(self) -> None:
        """Have them save and end."""

    def is_alive(self) -> bool:
        """Whether one of them is."""

    def end_group(self) -> None:
        """Kill them and whatever they started."""


_idle: list["_Worker"] = []
_busy: set[Busy] = set()
_numbered: dict[int, "_Worker"] = {}
_lock = threading.Lock()
_stopping = threading.Event()
_starter = ThreadPoolExecutor(1, thread_name_prefix="worker-starter")
"""Starts every worker: a worker dies with the thread that started it, and tasks' threads come and go."""


class WorkerCrash(Exception):
    """A library call failed with an error that is not ours: a bug. The message holds the worker's traceback."""


class _Worker:
    """One child process.

    Attributes:
        number: the lowest that none of those alive had when it was started: it decides which GPU it takes.
    """

    def __init__(self) -> None:
        self.environment = _environment()
        with _lock:
            self.number = next(number for number in itertools.count() if number not in _numbered)
            _numbered[self.number] = self
        read_end, write_end = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.worker", str(write_end), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=stderr_of_children(),
            pass_fds=(write_end,),
            env=environment_of_children(),
            start_new_session=True,
        )
        os.close(write_end)
        self._replies = os.fdopen(read_end, "rb", buffering=0)
        self._readable = select.poll()  # select() ends at descriptor 1024
        self._readable.register(read_end, select.POLLIN)
        self._pending = b""

    def send(self, request: dict[str, Any]) -> None:
        """Raises: BrokenPipeError when it has died."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next reply, None when none came in time. Raises: EOFError when the process has died."""
        while b"\n" not in self._pending:
            if not self._readable.poll(max(0.0, seconds) * 1000):
                return None
            block = self._replies.read(1 << 16)
            if not block:
                raise EOFError
            self._pending += block
        line, _, self._pending = self._pending.partition(b"\n")
        return dict(json.loads(line))

    def ask_to_stop(self) -> None:
        """Have it save and end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)

    def is_alive(self) -> bool:
        """Whether it is."""
        return self.process.poll() is None

    def end_group(self) -> None:
        """Kill it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it and whatever it started, now: between calls it holds nothing that could be lost."""
        self.end_group()
        self.process.wait()
        with _lock:
            if _numbered.get(self.number) is self:
                del _numbered[self.number]
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._replies.close()


def run_in_worker(
    function: Callable[..., Any],
    root: str,
    arguments: dict[str, Any],
    *,
    threads: int | None = None,
    device: DeviceChoice = "cpu",
    limit_seconds: float | None = None,
    progress: Progress = silent,
) -> None:
    """Call `function(Storage(root), **arguments, progress=...)` in a worker process and wait for it.

    Args:
        function: of a module that a worker can import; what it returns is dropped.
        arguments: JSON values and configs; the function's type hints say what they become in the worker.
        device: what a function with a parameter `device` is to compute on; the worker looks for it.
        limit_seconds: wall-clock limit; the worker's whole process group is killed then, also in blocked C code.

    Raises:
        PipelineError: what the function raised, of the same type.
        TransientError: the worker was lost, or took too long.
        WorkerCrash: the function failed in a way that was not foreseen.
        StopRequested: workers are being stopped.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    request = {
        "function": name,
        "root": root,
        "arguments": to_jsonable_python(arguments),
        "threads": threads,
        "device": device,
    }
    deadline = time.monotonic() + limit_seconds if limit_seconds is not None else float("inf")
    worker = _take()
    try:
        worker.send(request | {"number": worker.number})
        reply = _wait(worker, name, deadline, limit_seconds, progress)
    except (EOFError, BrokenPipeError) as err:
        _drop(worker)
        raise TransientError(
            f"the worker process of {name} (pid {worker.process.pid}) {how_it_ended(worker.process.wait())}. "
            f"What it had committed and its checkpoints are kept."
        ) from err
    except KeyboardInterrupt:  # it comes to main threads alone: a task that was cancelled on a cluster
        worker.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(STOP_SECONDS)
        _drop(worker)
        raise
    except BaseException:
        _drop(worker)
        raise
    # It ends after the one; after the other a GPU may be lost to it.
    if reply.get("error", {}).get("type") == "StopRequested" or "crash" in reply:
        _drop(worker)
    else:
        _give_back(worker)
    if "crash" in reply:
        raise WorkerCrash(f"{name} failed in a way that was not foreseen:\n{reply['crash']}")
    if "error" in reply:
        raise as_error(reply["error"])


def start_workers(count: int) -> None:
    """Start so many workers ahead of their first call, without waiting for them."""
    for _ in range(count):
        _starter.submit(lambda: _give_back(_Worker()))


def stop_workers() -> None:
    """Ask busy workers to save and end; kill those that do not in time. Calls fail from now on, until `accept_work`."""
    _stopping.set()
    with _lock:
        busy = list(_busy)
    for each in busy:
        each.ask_to_stop()
    if busy:
        logger.info("stopping: waiting for %d worker%s to save", len(busy), "s" * (len(busy) > 1))
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and any(each.is_alive() for each in busy):
        time.sleep(0.05)
    for each in busy:
        each.end_group()


def accept_work() -> None:
    """Take calls again after `stop_workers`."""
    _stopping.clear()


def is_stopping() -> bool:
    """Whether workers are being stopped, so that nothing should be tried again."""
    return _stopping.is_set()


@contextlib.contextmanager
def while_busy(work: Busy) -> Iterator[None]:
    """Let `stop_workers` know of processes at work. Raises: StopRequested when workers are being stopped."""
    with _lock:
        _busy.add(work)
    try:
        if _stopping.is_set():
            raise StopRequested("stopped")
        yield
    finally:
        with _lock:
            _busy.discard(work)


def environment_of_children() -> dict[str, str]:
    """What processes that call the library are started with."""
    defaults = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS does not promise the same bits twice
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return with_import_path(defaults | os.environ)


def stderr_of_children() -> int:
    """Where they print."""
    return sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL


def how_it_ended(status: int) -> str:
    """`was killed by SIGKILL`, or the exit status of a process."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def as_error(error: dict[str, Any]) -> PipelineError:
    """The error that a child has replied with."""
    if error["type"] == "DamagedError":
        return DamagedError(error["message"], error["ref"], error["part"])
    kind = getattr(errors, error["type"], PipelineError)
    return kind(error["message"]) if issubclass(kind, PipelineError) else PipelineError(error["message"])


def _wait(
    worker: _Worker, name: str, deadline: float, limit_seconds: float | None, progress: Progress
) -> dict[str, Any]:
    while True:
        reply = worker.receive(min(1.0, deadline - time.monotonic()))
        if reply is None:
            if time.monotonic() >= deadline:
                worker.kill()
                raise TransientError(
                    f"{name} took longer than {limit_seconds:g} s (execution.task_limit_seconds) and was killed"
                )
        elif "progress" in reply:
            progress(*reply["progress"])
        elif "log" in reply:
            source, level, message = reply["log"]
            logging.getLogger(source).log(level, "%s", message)
        else:
            return reply


def _take() -> _Worker:
    """An idle worker with today's environment, or a new one."""
    while True:
        if _stopping.is_set():
            raise StopRequested("stopped")
        with _lock:
            worker = _idle.pop() if _idle else None
            if worker is not None and worker.environment == _environment() and worker.process.poll() is None:
                _busy.add(worker)
                return worker
        if worker is None:
            break
        worker.kill()
    worker = _starter.submit(_Worker).result()
    with _lock:
        _busy.add(worker)
    return worker


def _give_back(worker: _Worker) -> None:
    with _lock:
        _busy.discard(worker)
        _idle.append(worker)


def _drop(worker: _Worker) -> None:
    with _lock:
        _busy.discard(worker)
    worker.kill()


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(READ_AT_START) or name.endswith(KEY_ENDINGS)
    }


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


@atexit.register
def _kill_all() -> None:
    with _lock:
        idle, busy = list(_idle), list(_busy)
        _idle.clear()
    for worker in idle:
        worker.kill()
    for each in busy:
        each.end_group()
