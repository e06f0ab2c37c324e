"""kill -9 at every step: before every system call on a disk, around every request on a bucket."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae.store import layout
from sae.store.artefacts.records import read_record
from sae.store.storage.filesystem import Storage
from tests.bad_days import small_store
from tests.bad_days.children import may_trace
from tests.bad_days.place import NotHereError, Place, uninterrupted
from tests.bad_days.small_store import PARTS, SNAPSHOT
from tests.sae.store.network import Request


class Job(NamedTuple):
    """Work that a child is killed in."""

    work: str
    arguments: tuple[Any, ...]
    prepare: Callable[[Storage], None]
    """What was done before."""
    target: tuple[str, int | None]
    """The record that the work creates, or mends."""
    damages: bool = False
    """Whether `prepare` leaves damage, so that not all is whole before the work is done again."""


def _some_parts(storage: Storage) -> None:
    small_store.write(storage, 0)
    small_store.write_plan(storage)


def _all_parts(storage: Storage) -> None:
    small_store.build(storage)
    storage.remove(layout.record_path(SNAPSHOT.ref))
    small_store.collect(storage)


def _damaged_part(storage: Storage) -> None:
    small_store.build(storage)
    record = read_record(storage, PARTS.ref, 1)
    assert record is not None
    path = record.path(small_store.PART_FILE)
    storage.replace(path, storage.read_bytes(path)[:-1])


def _damaged_record(storage: Storage) -> None:
    small_store.build(storage)
    storage.replace(layout.record_path(PARTS.ref, 1), b"torn")


def _garbage(storage: Storage) -> None:
    """Files of a part and of the snapshot that no record names, beside finished parts."""
    small_store.build(storage)
    for path in (layout.record_path(PARTS.ref, 1), layout.record_path(SNAPSHOT.ref)):
        storage.remove(path)


JOBS = {
    "commit of a part": Job("part", (1,), _some_parts, (PARTS.ref, 1)),
    "commit of a snapshot": Job("snapshot", (), _all_parts, (SNAPSHOT.ref, None)),
    "repair of a part": Job("part", (1,), _damaged_part, (PARTS.ref, 1), damages=True),
    "repair of a record": Job("part", (1,), _damaged_record, (PARTS.ref, 1), damages=True),
    "collection of garbage": Job("collect", (0,), _garbage, (PARTS.ref, 1)),
}


def at_system_calls(place: Place, name: str, tries: int | None, seed: int = 0) -> Iterator[str]:
    """Kill a job on a disk before its system calls, each once (`tries` None) or as many as told.

    Yields: what was found after each kill. Raises: NotHereError where a child cannot be stepped through;
        AssertionError when something was lost.
    """
    if not may_trace():
        raise NotHereError("a process may not step through its child here (ptrace)")
    job = JOBS[name]
    origin = place.fresh(False)
    job.prepare(origin)
    for number, step in enumerate(_steps(place, job, origin, tries, seed)):
        storage = place.copy(origin)
        before = set() if job.damages else small_store.named(storage)
        end = place.children.run(job.work, storage.root, *job.arguments, die_at=step)
        if end.signal != signal.SIGKILL:  # threads: the number of calls is not always the same
            assert end.said == "null" or end.said.startswith("["), end
        yield _look(storage, job, before, collected=number % 2 == 0)
        place.discard(storage)
        if end.signal != signal.SIGKILL and tries is None:
            return


def _steps(place: Place, job: Job, origin: Storage, tries: int | None, seed: int) -> Iterator[int]:
    if tries is None:
        yield from range(1, 100_000)
        return
    counted = place.children.run(job.work, place.copy(origin).root, *job.arguments, die_at=0).steps
    yield from sorted(random.Random(seed).sample(range(1, counted + 1), min(tries, counted)))


def around_requests(place: Place, name: str, tries: int | None, seed: int = 0) -> Iterator[str]:
    """Kill a job on a bucket before the server hears of a request, or after it did what it was asked.

    Args, yields, raises: as `at_system_calls`.
    """
    job = JOBS[name]
    origin = place.fresh(True)
    job.prepare(origin)
    draw = random.Random(seed)
    for number, (request, is_done) in enumerate(_moments(tries, draw)):
        storage = place.copy(origin)
        before = set() if job.damages else small_store.named(storage)
        with place.network() as hop:
            killed = kill_at_request(place, hop, job.work, storage, job.arguments, request, is_done)
        yield _look(storage, job, before, collected=number % 2 == 0)
        if tries is None and not killed and not is_done:
            return


def _moments(tries: int | None, draw: random.Random) -> Iterator[tuple[int, bool]]:
    if tries is None:
        yield from ((request, is_done) for request in range(10_000) for is_done in (True, False))
    else:
        yield from ((draw.randrange(6), draw.random() < 0.5) for _ in range(tries))


def kill_at_request(
    place: Place, hop: Any, work: str, storage: Storage, arguments: tuple[Any, ...], number: int, is_done: bool
) -> bool:
    """Kill a child when its request of this number arrives.

    Args:
        is_done: the server does what the request asks, and nobody hears the answer.

    Returns: whether there was such a request.
    """
    state: dict[str, int] = {"seen": 0, "pid": 0}

    def fault(request: Request) -> str:
        count, state["seen"] = state["seen"], state["seen"] + 1
        if count < number:
            return ""
        if count == number and is_done:
            return "lose"
        # After a lost answer the client's next request, or the same again, is where it dies.
        os.kill(state["pid"], signal.SIGKILL)
        return "drop"

    hop.fault = lambda request: "503 SlowDown" if not state["pid"] else fault(request)
    state["pid"] = place.children.start(work, storage.root, *arguments, environment=place.environment(hop))
    end = place.children.end()
    assert end.signal == signal.SIGKILL or end.said == "null", end
    return end.signal == signal.SIGKILL


def torn_uploads(place: Place, tries: int | None, seed: int = 0) -> Iterator[str]:
    """Kill a child around the requests of an upload in pieces. Yields, raises: as `at_system_calls`."""
    draw = random.Random(seed)
    for number, (request, is_done) in enumerate(_moments(tries, draw)):
        storage = place.fresh(True)
        with place.network() as hop:
            killed = kill_at_request(place, hop, "big file", storage, (), request, is_done)
        small_store.check_whole(storage, set())
        has_record = read_record(storage, small_store.BIG.ref) is not None
        objects = [path for path in storage.sizes("") if path.endswith("/big")]
        assert [storage.size(path) for path in objects] in ([], [small_store.BIG_BYTES]), "an object is all of it"
        torn = list(storage.torn_uploads())
        small_store.check_resumed(
            storage, uninterrupted(small_store.write_big), small_store.write_big, collected=number % 2 == 0
        )
        state = "committed" if has_record else "not committed"
        yield f"{state}, {'torn upload given up' if torn else 'no upload left'}; resumed to equal bytes"
        if tries is None and not killed and not is_done:
            return


def _look(storage: Storage, job: Job, before: set[str], collected: bool) -> str:
    """Check everything. Returns: whether the old or the new state was found."""
    if job.damages:
        for part in (0, 2):
            assert read_record(storage, PARTS.ref, part) is not None
        state = "old" if small_store.problems(storage) else "new"
        small_store.build(storage)
        collected = False
        for path in Path(storage.root).glob(f"{PARTS.ref}/*.damaged-*") if storage.is_local else ():
            path.unlink()  # kept until somebody asks for it to go
    else:
        small_store.check_whole(storage, before)
        state = "old" if read_record(storage, *job.target) is None else "new"
    small_store.check_resumed(storage, uninterrupted(), small_store.build, collected)
    return f"{state} state, all that was committed whole; resumed to equal bytes"
