"""Gangs on bad days: ranks and agents killed, stopped and terminated at random moments, and what came of each call.

`python -m tests.benchmarks gang`, or with tries and a seed `python -m tests.benchmarks.gang 30 7`.
"""

import contextlib
import os
import random
import signal
import statistics as median_of
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

from sae.errors import TransientError
from sae.pipeline_config import NodeConfig
from sae.progress import Progress
from sae.train.config import MeshConfig
from tasks.attempt import EXIT_SECONDS, GONE_SECONDS, HANG_UP_SECONDS, LAST_WORDS_SECONDS
from tasks.gang import GangConfig, run_gang
from tests.processes import marked
from tests.tasks import gang_work

TRIES, SEED = 30, 0
MARK = "SAE_PIPELINE_TEST_GANG"
GANG = GangConfig(
    mesh=MeshConfig(data=4),
    nodes=(NodeConfig(address=IPv4Address("127.0.0.1")), NodeConfig(address=IPv4Address("127.0.0.2"))),
    threads=1,
    collective_timeout_seconds=6,
    heartbeat_timeout_seconds=30,
)
DEADLINE_SECONDS = GANG.heartbeat_timeout_seconds + LAST_WORDS_SECONDS + EXIT_SECONDS + HANG_UP_SECONDS + GONE_SECONDS
LEFT_SECONDS = 2.0
"""How long what is killed, and has closed its files, may take to be gone."""
MOMENTS = ("while it starts", "in a step", "at the last step")


class _Try(NamedTuple):
    """What came of a fault.

    Attributes:
        ended: seconds from the fault to the end of the attempt.
        recovered: from the fault to the first step of the next attempt; None where the attempt went on.
    """

    outcome: str
    ended: float
    recovered: float | None


def gang(folder: Path, tries: int = TRIES, seed: int = SEED) -> Iterator[str]:
    """One line per fault: tries, outcomes, seconds until the attempt had ended and until work went on.

    Raises: AssertionError when a result was wrong, a process was left, or an attempt outlived its deadline.
    """
    yield f"{'fault, two nodes of two ranks':<46} {'tries':>5}  {'ended (max)':>14} {'went on (max)':>15}  outcome"
    rng, found = random.Random(seed), {}
    for number in range(tries):
        whom, what = rng.choice(["rank", "agent"]), rng.choice(["SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM"])
        moment = MOMENTS[number % len(MOMENTS)]
        here = folder / str(number)
        here.mkdir()
        found.setdefault(f"{what} to a random {whom} {moment}", []).append(_attempts(here, whom, what, moment, rng))
    for name, made in sorted(found.items()):
        outcomes = "; ".join(f"{count}: {what}" for what, count in Counter(each.outcome for each in made).most_common())
        went_on = _seconds([each.recovered for each in made if each.recovered is not None])
        yield f"{name:<46} {len(made):>5}  {_seconds([each.ended for each in made]):>14} {went_on:>15}  {outcomes}"


def _attempts(folder: Path, whom: str, what: str, moment: str, rng: random.Random) -> _Try:
    """One attempt with the fault, and as many as it takes without."""
    struck: list[float] = []
    os.environ[MARK] = mark = folder.name + uuid.uuid4().hex

    def strike() -> None:
        if (victims := marked(MARK, mark, f"tasks.{whom}")) and not struck:
            struck.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(victims), getattr(signal, what))

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done >= step:
            strike()

    last = gang_work.N_STEPS - 1
    step = {"in a step": rng.randrange(1, last), "at the last step": last}.get(moment, gang_work.N_STEPS + 1)
    wait = rng.uniform(0, 1.5)

    def strike_early() -> None:
        while not marked(MARK, mark, f"tasks.{whom}"):
            time.sleep(0.02)
        time.sleep(wait)
        strike()

    early = threading.Thread(target=strike_early, daemon=True)
    if moment == "while it starts":
        early.start()
    outcome = "went on"
    try:
        _call(folder, progress)
    except TransientError as err:
        outcome = type(err).__name__
    assert struck, "the attempt had ended before the fault came"
    ended = time.monotonic() - struck[0]
    assert ended < DEADLINE_SECONDS, f"{what} to a {whom} {moment}: {ended:.1f} s"
    left = time.monotonic() + LEFT_SECONDS
    while marked(MARK, mark) and time.monotonic() < left:
        time.sleep(0.05)
    assert not marked(MARK, mark), f"{what} to a {whom} {moment} has left processes"
    recovered: list[float] = []
    if outcome != "went on":
        _call(folder, lambda *_: recovered.append(time.monotonic() - struck[0]))
    assert (folder / "result").read_text() == gang_work.expected(GANG.mesh.world)
    return _Try(outcome, ended, recovered[0] if recovered else None)


def _call(folder: Path, progress: Progress) -> None:
    arguments = {"folder": str(folder), "step_seconds": 0.1}
    run_gang(gang_work.add_up, str(folder / "root"), arguments, GANG, progress=progress)


def _seconds(values: list[float]) -> str:
    return f"{median_of.median(values):.1f} s ({max(values):.1f})" if values else "-"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        for line in gang(Path(here), *map(int, sys.argv[1:])):
            print(line, flush=True)
