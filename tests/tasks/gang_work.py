"""A call in many processes for the tests of gangs: every rank adds its share at every step, and faults come as told."""

import ctypes
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from sae.errors import ConfigError, StopRequested
from sae.progress import Progress, silent
from sae.store.artefacts.records import commit
from sae.store.storage.filesystem import Storage
from sae.train.mesh import Mesh
from tests.tasks.work import ThingSpec

N_STEPS = 40


def expected(world: int) -> str:
    """What `add_up` ends with, however often it was broken off."""
    total = 0
    for step in range(N_STEPS):
        total = (3 * total + sum(step * (rank + 1) for rank in range(world))) % 1_000_003
    return str(total)


def add_up(
    storage: Storage,
    folder: str,
    fault: str = "",
    fault_rank: int = 1,
    fault_step: int = 13,
    step_seconds: float = 0.01,
    *,
    shared: Mesh,
    progress: Progress = silent,
) -> None:
    """A training run in small: a sum over ranks every step, a checkpoint by rank 0, a result.

    Args:
        folder: gets pids, checkpoint, result, and a mark of the fault, which happens once.
        fault: what `happen` takes. It comes after the step's sum, so that the last step has one, too.
    """
    rank, place = shared.rank, Path(folder)
    (place / f"pids-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    logging.getLogger("sae.adding").info("adds")
    checkpoint = place / "checkpoint.json"
    step, total = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0)
    while step < N_STEPS:
        share = shared.sum_rows(torch.tensor(step * (rank + 1)))
        step, total = step + 1, (3 * total + int(share)) % 1_000_003
        if fault and (rank, step) == (fault_rank, fault_step) and not (place / "fault").exists():
            (place / "fault").write_text(fault)
            happen(fault)
        time.sleep(step_seconds)
        asked = None
        try:
            progress(step, N_STEPS, "steps")
        except StopRequested as err:
            asked = err
        stopping = shared.agree(asked is not None)
        if rank == 0 and (stopping or step % 10 == 0):
            (place / "new").write_text(json.dumps([step, total]))
            (place / "new").rename(checkpoint)
        if stopping:
            (place / f"stopped-{rank}").write_text(str(step))
            raise asked or StopRequested("another rank was asked to stop")
    if rank == 0:
        (place / "result").write_text(str(total))


def happen(fault: str) -> None:
    """`config`, `bug` or `hang` in this rank, or a signal to it or to its agent: `agent SIGSTOP`."""
    if fault == "config":
        raise ConfigError("k > d_sae")
    if fault == "bug":
        raise ZeroDivisionError("a bug")
    if fault == "hang":
        ctypes.PyDLL(None).sleep(600)  # in C, with the interpreter's lock
    whom, name = fault.split()
    os.kill(os.getpid() if whom == "rank" else os.getppid(), getattr(signal, name))
    time.sleep(0.5)  # until it has come


def leave(storage: Storage, *, shared: Mesh) -> None:
    """Rank 1 goes without a word while the others wait for it."""
    if shared.rank == 1:
        os._exit(3)
    shared.agree(False)


def make(storage: Storage, spec: ThingSpec, fault: str = "", *, shared: Mesh) -> None:
    """Rank 0 commits an artefact; then rank 1 may meet a fault."""
    if shared.rank == 0:
        with storage.staging() as folder:
            (folder / "a").write_text("x" * spec.size)
            commit(storage, spec, folder, {}, seconds=0)
    shared.agree(False)
    if fault and shared.rank == 1:
        happen(fault)


def listen_where(storage: Storage, folder: str, *, shared: Mesh) -> None:
    """Every rank writes down on which addresses it and its agent listen."""
    shared.agree(False)
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    listening = [line for line in listening if line[3] == "0A"]
    for pid in (os.getpid(), os.getppid()):
        mine = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()}
        addresses = [line[1].partition(":")[0] for line in listening if f"socket:[{line[9]}]" in mine]
        (Path(folder) / f"listens-{pid}").write_text(" ".join(addresses))
    shared.agree(False)


def print_much(storage: Storage, *, shared: Mesh) -> None:
    """Prints and logs from all ranks at once, more than a pipe takes undivided."""
    for number in range(50):
        print("a print of the function", flush=True)
        print("another", file=sys.stderr, flush=True)
        logging.getLogger("sae.talking").info("%d %s", number, str(shared.rank) * 9000)
