"""The child side of a task: runs library calls, one at a time, and reports in lines of JSON.

Started by `tasks.process`. It reads requests from stdin and writes replies to the file descriptor it is given. It
imports no Prefect. SIGTERM asks the work to end at its next progress call: training saves a checkpoint first.
"""

import importlib
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TextIO, get_type_hints

from pydantic import TypeAdapter

from sae.errors import PipelineError, StopRequested, TransientError
from sae.progress import Progress
from tasks.tied import tie_to, watch

if TYPE_CHECKING:
    import torch

PROGRESS_SECONDS = 0.1
"""Between progress lines."""


class Replies(Protocol):
    """What tells the parent, from any thread."""

    def send(self, **reply: Any) -> None:
        """Write one reply, JSON values."""


class _Lines:
    """Replies as lines of JSON."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, **reply: Any) -> None:
        line = json.dumps(reply)
        with self._lock:
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except BrokenPipeError:  # nobody is there to work for
                os._exit(1)


class Stop:
    """Whether SIGTERM has come. It ends a process that is not busy."""

    def __init__(self) -> None:
        self.requested = self.busy = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def _on_signal(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self.busy:
            os._exit(0)


class _Forward(logging.Handler):
    """Log records to the parent, which knows where they are shown."""

    def __init__(self, replies: Replies) -> None:
        super().__init__(logging.INFO)
        self._replies = replies

    def emit(self, record: logging.LogRecord) -> None:
        self._replies.send(log=[record.name, record.levelno, record.getMessage()])


def main(replies_fd: int, parent: int) -> None:
    """Serve requests until stdin is closed."""
    tie_to(parent)
    watch(parent)
    replies = _Lines(os.fdopen(replies_fd, "w", encoding="utf-8"))
    stop = Stop()
    forward_logs(replies)
    for line in sys.stdin.buffer:
        stop.busy = True
        progress = progress_to(replies, stop, PROGRESS_SECONDS)
        reply = answer(partial(call, json.loads(line), progress))
        _release_gpu_memory()
        replies.send(**reply)
        if stop.requested:
            return
        stop.busy = False


def _release_gpu_memory() -> None:
    """So that what waits for its next call has no more of a GPU than a context."""
    from sae.device import release_memory

    release_memory()


def forward_logs(replies: Replies) -> None:
    """From now on send what is logged: of ours from INFO, of others from WARNING."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Forward(replies)])
    for name in ("sae", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)


def progress_to(replies: Replies, stop: Stop, seconds: float) -> Progress:
    """A callback that sends progress, at most every so many seconds, and raises StopRequested once SIGTERM has come."""
    last_sent = 0.0

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        nonlocal last_sent
        if stop.requested:
            raise StopRequested("stopped by SIGTERM")
        now = time.monotonic()
        if done >= total or now - last_sent >= seconds:
            last_sent = now
            replies.send(progress=[int(done), int(total), unit, note])

    return progress


def answer(work: Callable[[], None]) -> dict[str, Any]:
    """Do the work. Returns: the reply that says how it ended."""
    try:
        work()
    except PipelineError as err:
        place = {"ref": err.ref, "part": err.part} if hasattr(err, "ref") and hasattr(err, "part") else {}
        return {"error": {"type": type(err).__name__, "message": str(err)} | place}
    except (ConnectionError, TimeoutError) as err:
        return {"error": {"type": "TransientError", "message": f"{type(err).__name__}: {err}"}}
    except Exception:
        return {"crash": traceback.format_exc()}
    return {"done": True}


def call(request: dict[str, Any], progress: Progress, device: "torch.device | None" = None, **given: Any) -> None:
    """Call the function that is asked for, with `given` beside the arguments of the request.

    Args:
        device: that the function computes on, if it takes one; None: as the request says.
    """
    import torch

    from sae.device import CPU, choose_device, prepare
    from sae.store.storage.filesystem import Storage

    if request["threads"] is not None:  # the same count gives the same bits
        torch.set_num_threads(request["threads"])
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function, include_extras=True)
    arguments = {
        key: TypeAdapter(hints[key]).validate_json(json.dumps(value)) for key, value in request["arguments"].items()
    }
    if "progress" in parameters:
        arguments["progress"] = progress
    if "device" in parameters:
        arguments["device"] = device = device or choose_device(request["device"], request["number"])
    prepare(device or CPU)
    try:
        function(Storage(request["root"]), **arguments, **given)
    except torch.OutOfMemoryError as err:
        raise TransientError(
            f"{request['function']}: the GPU has no memory left ({str(err).splitlines()[0]}). Lower "
            f"execution.max_workers, batch_rows or activations.batch_contexts, share the SAE by execution.mesh, or set "
            f"execution.device to cpu."
        ) from err


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
