"""Gangs on bad days: ranks and agents killed and stopped in a real training, and what came of it.

`python -m tests.benchmarks gang` makes every fault at every moment once, in the order of a seed.
`python -m tests.benchmarks.gang 24 7` does so with another seed, `gang 3 7 21` makes the last three of these tries.
"""

import contextlib
import os
import random
import shutil
import signal
import statistics as median_of
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from sae.errors import TransientError
from sae.pipeline_config import NodeConfig
from sae.store.artefacts.checkpoints import remove_checkpoints
from sae.store.artefacts.records import require_record, verify
from sae.store.storage.filesystem import Storage
from sae.train.config import MeshConfig, SAESpec
from tasks.attempt import EXIT_SECONDS, GONE_SECONDS, HANG_UP_SECONDS, LAST_WORDS_SECONDS
from tasks.caching import Job, produce
from tasks.gang import GangConfig
from tests.bad_days import gang_training
from tests.bad_days.gang_training import EVERY, N_STEPS, OVER, PAUSE_SECONDS
from tests.processes import in_use, marked

MARK = "SAE_PIPELINE_TEST_GANG"
GANG = GangConfig(
    mesh=MeshConfig(latents=2),
    nodes=(NodeConfig(address=IPv4Address("127.0.0.1")), NodeConfig(address=IPv4Address("127.0.0.2"))),
    threads=1,
    collective_timeout_seconds=15,
    heartbeat_timeout_seconds=60,
)
DEADLINE_SECONDS = GANG.heartbeat_timeout_seconds + LAST_WORDS_SECONDS + EXIT_SECONDS + HANG_UP_SECONDS + GONE_SECONDS
"""From a fault to the end of its attempt."""
LEFT_SECONDS = 2.0
"""How long what is killed, and has closed its files, may take to be gone."""
MOST_ATTEMPTS = 5
"""A machine that is busy with other things may lose an attempt of its own accord."""
MOMENTS = ("while it starts", "in a step", "in a save", "at the last step", "in calibration", "in the commit")
"""Of these, those in the middle last PAUSE_SECONDS."""
FAULTS = [(what, whom) for what in ("SIGKILL", "SIGSTOP") for whom in ("rank", "agent")]
CELLS = [(fault, moment) for fault in FAULTS for moment in MOMENTS]


class _Try(NamedTuple):
    """What came of a fault.

    Attributes:
        attempts: that it took, with the one that was struck.
        hit: the moment had not passed when the fault came.
        right: the SAE has the bytes of an undisturbed training.
        ended: seconds from the fault to the end of its attempt.
        recovered: from the fault to the first step of the next attempt; None where none was needed.
        orphans: processes that were left of any attempt.
        strays: files that no record names, in the root, the temporary folder and shared memory.
    """

    attempts: int
    hit: bool
    right: bool
    ended: float
    recovered: float | None
    orphans: int
    strays: list[str]


def gang(folder: Path, tries: int = len(CELLS), seed: int = 0, first: int = 0) -> Iterator[str]:
    """A line per try, then one per fault and moment: right ones, seconds until the attempt had ended and work went on.

    Args:
        seed: of the order of faults and moments, and with the number of a try of what else is random in it.
        first: the number of the first try.

    Raises: AssertionError when an SAE was wrong, an attempt outlived its deadline, or anything was left.
    """
    storage, spec = gang_training.new_root(folder / "origin")
    (undisturbed := folder / "undisturbed").mkdir()
    expected = _train(storage, spec, undisturbed)
    shutil.rmtree(storage.full(spec.ref))
    found: dict[tuple[str, str], list[_Try]] = {}
    cells = random.Random(seed).sample(CELLS, len(CELLS))
    yield (
        f"{'fault':<19} {'moment':<17} {'tries':>5} {'hit':>5} {'right':>5}  {'ended (max)':>15} {'went on (max)':>15} "
        f"{'orphans':>7} {'strays':>6}"
    )
    wrong: list[str] = []
    for number in range(first, first + tries):
        rng = random.Random(f"{seed} {number}")
        (what, whom), moment = cells[number % len(cells)]
        made = _disturbed(folder / str(number), storage, spec, (what, whom, moment), rng, expected)
        name = f"{what} to {'a rank' if whom == 'rank' else 'an agent'}"
        found.setdefault((name, moment), []).append(made)
        yield _line(name, moment, [made])
        if not made.right or made.orphans or made.strays or made.ended > DEADLINE_SECONDS:
            wrong.append(f"try {number}, {what} to {whom} {moment}: {made}")
    yield ""
    for (fault, moment), each in sorted(found.items(), key=lambda item: (item[0][0], MOMENTS.index(item[0][1]))):
        yield _line(fault, moment, each)
    yield _line("all", "", [made for each in found.values() for made in each])
    assert not wrong, "\n".join(wrong)


def _line(fault: str, moment: str, tries: Sequence[_Try]) -> str:
    ended, went_on = [each.ended for each in tries], [each.recovered for each in tries if each.recovered is not None]
    return (
        f"{fault:<19} {moment:<17} {len(tries):>5} {sum(each.hit for each in tries):>5} "
        f"{sum(each.right for each in tries):>5}  {_seconds(ended):>15} "
        f"{_seconds(went_on):>15} {sum(each.orphans for each in tries):>7} "
        f"{sum(len(each.strays) for each in tries):>6}"
    )


def _disturbed(
    folder: Path, origin: Storage, spec: SAESpec, fault: tuple[str, str, str], rng: random.Random, expected: str
) -> _Try:
    """One training with the fault, in as many attempts as it takes."""
    what, whom, moment = fault
    shutil.copytree(origin.root, folder / "root")
    (temporary := folder / "temporary").mkdir()
    (signs := folder / "signs").mkdir()
    storage, before, mark = Storage(str(folder / "root")), _shared_memory(), uuid.uuid4().hex
    ended: list[float] = []
    attempts = orphans = 0
    with mock.patch.dict(os.environ, {MARK: mark, "TMPDIR": str(temporary)}):
        place = _place(moment, rng)
        strike = _Strike(what, whom, signs / place if place else None, mark, rng)
        strike.start()
        while True:
            attempts, error = attempts + 1, None
            try:
                content = _train(storage, spec, signs, place)
            except TransientError as err:
                error = err
            assert error is None or attempts < MOST_ATTEMPTS, f"{fault}: no attempt came to its end: {error}"
            if strike.at:
                ended.append(time.monotonic() - strike.at)
            orphans += _left(mark)
            if error is None:
                break
        strike.join(60)
    assert strike.at, f"{fault}: the training had ended before the fault came"
    steps = [float(line) for line in (signs / gang_training.STEPS).read_text().split()]
    recovered = [step - strike.at for step in steps if step > strike.at] if attempts > 1 else []
    right = content == expected and verify(storage, require_record(storage, spec.ref)) == []
    strays = [
        *sorted(_files(storage) - _files(origin) - _named(storage, spec)),
        *sorted(path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")),  # its cache
        *sorted(path for path in _shared_memory() - before if not in_use(path)),  # other programs may be at work
    ]
    return _Try(attempts, strike.hit, right, ended[0], recovered[0] if recovered else None, orphans, strays)


def _place(moment: str, rng: random.Random) -> str:
    """Where `gang_training.train` is to wait for the fault; nowhere: it comes when there is somebody to strike."""
    step, save = rng.randrange(2, N_STEPS), EVERY * rng.randrange(1, (N_STEPS - 1) // EVERY + 1)
    return {
        "while it starts": "",
        "in a step": f"step-{step}",
        "in a save": rng.choice([f"save-{save}", f"pointer-{save}"]),
        "at the last step": f"step-{N_STEPS}",
        "in calibration": "calibration",
        "in the commit": "commit",
    }[moment]


class _Strike(threading.Thread):
    """Sends a signal to one of the ranks or agents, a random while after a sign.

    Attributes:
        at: when, by `time.monotonic()`.
        hit: what the sign is of had not passed.
    """

    def __init__(self, what: str, whom: str, sign: Path | None, mark: str, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self._signal, self._whom, self._sign, self._mark = getattr(signal, what), f"tasks.{whom}", sign, mark
        self._wait, self._choice = rng.uniform(0, 0.75 * PAUSE_SECONDS if sign else 1.5), rng.random()
        self.at, self.hit = 0.0, False

    def run(self) -> None:
        while not (self._sign.exists() if self._sign else marked(MARK, self._mark, self._whom)):
            time.sleep(0.005)
        time.sleep(self._wait)
        if victims := sorted(marked(MARK, self._mark, self._whom)):
            self.at = time.monotonic()
            self.hit = not (self._sign and self._sign.with_name(f"{self._sign.name}{OVER}").exists())
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[int(self._choice * len(victims))], self._signal)


def _train(storage: Storage, spec: SAESpec, signs: Path, pause_at: str = "") -> str:
    """As the train task does, and the flow after it. Returns: the digest of the SAE's files."""
    arguments = {"specs": [spec], "signs": str(signs), "pause_at": pause_at}
    produce(Job(root=storage.root), [spec], gang_training.train, arguments, gang=GANG)
    remove_checkpoints(storage, spec.ref)
    return require_record(storage, spec.ref).content


def _left(mark: str) -> int:
    """Processes that are there though they should not be."""
    until = time.monotonic() + LEFT_SECONDS
    while (left := marked(MARK, mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def _files(storage: Storage) -> set[str]:
    root = Path(storage.root)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _named(storage: Storage, spec: SAESpec) -> set[str]:
    record = require_record(storage, spec.ref)
    return {f"{spec.ref}/record.json", *(record.path(entry.name) for entry in record.files)}


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {str(path) for path in folder.iterdir()} if folder.is_dir() else set()


def _seconds(values: Sequence[float]) -> str:
    return f"{median_of.median(values):.1f} s ({max(values):.1f})" if values else "-"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        for line in gang(Path(here), *map(int, sys.argv[1:])):
            print(line, flush=True)
