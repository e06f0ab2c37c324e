"""Library calls for the tests of worker processes: each ends in its own way."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch

from sae.config import Spec
from sae.errors import ConfigError, DamagedError, StopRequested, TransientError
from sae.progress import Progress, silent
from sae.store.artefacts.records import commit
from sae.store.storage.filesystem import Storage


class ThingSpec(Spec):
    stage: ClassVar[str] = "things"
    code_version: ClassVar[int] = 1
    size: int


def make(storage: Storage, spec: ThingSpec, log: str | None = None, *, progress: Progress = silent) -> None:
    """Commits an artefact and says so in a log file: pid and threads."""
    progress(1, 2, "things", "half")
    logging.getLogger("sae.making").info("made %d", spec.size)
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    with storage.staging() as folder:
        (folder / "a").write_text("x" * spec.size)
        commit(storage, spec, folder, {}, seconds=0)


def fail(storage: Storage, kind: str) -> None:
    errors = {
        "config": ConfigError("k > d_sae"),
        "transient": TransientError("503 SlowDown"),
        "damaged": DamagedError("part.parquet: damaged", "parts/0123456789abcdef", 3),
        "network": ConnectionResetError("by peer"),
        "bug": ZeroDivisionError("a bug"),
    }
    raise errors[kind]


def die(storage: Storage) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(storage: Storage, pids: str) -> None:
    """Blocks in C with the interpreter lock held, beside a child that ignores SIGTERM."""
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
    Path(pids).write_text(f"{os.getpid()} {child.pid}")
    ctypes.PyDLL(None).sleep(600)


def work_until_stopped(storage: Storage, pids: str, *, progress: Progress = silent) -> None:
    """Saves where it is when it is asked to stop."""
    Path(pids).write_text(str(os.getpid()))
    step = 0
    try:
        while True:
            step += 1
            progress(step, 1_000_000, "steps")
            time.sleep(0.01)
    except StopRequested:
        Path(pids).with_suffix(".saved").write_text(str(step))
        raise


def note_device(storage: Storage, log: str, *, device: torch.device | str = "nothing was said") -> None:
    """Writes down what it is to compute on."""
    Path(log).write_text(str(device))


def note_device_in_gang(
    storage: Storage, log: str, *, device: torch.device | str = "nothing was said", shared: object = None
) -> None:
    """The same, of every rank."""
    with open(log, "a") as file:
        file.write(f"{device}\n")


def fill_a_gpu(storage: Storage) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
