"""A disk that is full at every moment of a write: `python -m tests.bad_days.disks DISK TRIES` on a tmpfs of its own.

For each amount of room, from none to enough, the work is begun with only that much left. Prints the outcomes as JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.checkpoints import Checkpoints, Position
from sae.store.artefacts.modules import named_tensor
from sae.store.storage.filesystem import Storage
from tests.bad_days import small_store
from tests.bad_days.place import NotHereError, uninterrupted
from tests.small_disk import on_small_disk

PAGE_BYTES = 4096
WORKS = ("write and commit of a part", "commit of a snapshot", "checkpoint")
ROOMS = ("bytes", "files")
"""What runs out."""
REF = "saes/0123456789abcdef"


def full_disk(folder: Path, tries: int | None) -> dict[str, list[str]]:
    """Run this module on a tmpfs that nobody else sees.

    Args:
        tries: of the amounts of room, evenly spread; all of them by default.

    Returns: what was found for each amount, by what was written and what ran out.
    Raises: NotHereError where no file system can be mounted.
    """
    command = on_small_disk(folder, "size=4m,nr_inodes=200")
    if command is None:
        raise NotHereError("a small file system cannot be mounted here (unshare, tmpfs)")
    arguments = [str(folder), "all" if tries is None else str(tries)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.bad_days.disks", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def at_every_room(disk: Path, work: str, room: str, tries: int | None) -> Iterator[str]:
    """Yields: what was found for each amount of room."""
    most = _room_needed(disk, work, room)
    step = 1 if tries is None else max(1, -(-most // tries))
    for left in range(0, most + 1, step):
        root = disk / "root"
        storage = Storage(str(root))
        job, check = _prepare(storage, work)
        before = small_store.named(storage)
        filler = _fill(disk, room, left)
        try:
            job()
            error = None
        except StoreError as err:
            error = str(err)
        if error is None:
            outcome = "there was room"
        else:
            assert "disk full" in error, error
            assert "Free some space and run the same command again" in error
            small_store.check_whole(storage, before)
            outcome = "named error, nothing half-written; resumed to equal bytes"
        _empty(filler)
        check()
        yield outcome
        shutil.rmtree(root)


def _room_needed(disk: Path, work: str, room: str) -> int:
    """The least room in which the work is done."""
    for left in range(200):
        storage = Storage(str(disk / "root"))
        job, _ = _prepare(storage, work)
        filler = _fill(disk, room, left)
        try:
            job()
            return left
        except StoreError:
            continue
        finally:
            _empty(filler)
            shutil.rmtree(disk / "root")
    raise AssertionError(f"{work} needs more than {left} {room}")


def _prepare(storage: Storage, work: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Returns: the work, and a check that it can be done again and ends as if nothing had happened."""
    if work == "checkpoint":
        small_store.write(storage, 0)
        Checkpoints(storage, REF, Position, "a" * 16).save({"value": torch.full((9000,), 1.0)}, Position(step=1))
        return lambda: _save(storage), lambda: _check_checkpoints(storage)
    small_store.write(storage, 0)
    if work == "commit of a snapshot":
        small_store.build(storage)
        storage.remove(layout.record_path(small_store.SNAPSHOT.ref))
        small_store.collect(storage)
        job: Callable[[Storage], None] = small_store.write_snapshot
    else:
        job = lambda storage: small_store.write(storage, 1)
    return lambda: job(storage), lambda: small_store.check_resumed(
        storage, uninterrupted(), small_store.build, collected=True
    )


def _save(storage: Storage) -> None:
    Checkpoints(storage, REF, Position, "b" * 16).save({"value": torch.full((9000,), 2.0)}, Position(step=2))


def _load(storage: Storage) -> tuple[int, float]:
    found: list[float] = []
    position = Checkpoints(storage, REF, Position, "c" * 16).load(
        lambda tensors, _: found.append(float(named_tensor(tensors, "value")[0]))
    )
    assert position is not None
    return position.step, found[-1]


def _check_checkpoints(storage: Storage) -> None:
    """The newest whole one is found, and the next is written when there is room."""
    assert _load(storage) in ((1, 1.0), (2, 2.0))
    Checkpoints(storage, REF, Position, "d" * 16).save({"value": torch.full((9000,), 3.0)}, Position(step=3))
    assert _load(storage) == (3, 3.0)
    assert small_store.problems(storage) == []


def _fill(disk: Path, room: str, left: int) -> Path:
    """Leave only so many pages or files free."""
    filler = disk / "filler"
    filler.mkdir()
    found = os.statvfs(disk)
    if room == "bytes":
        with open(filler / "a", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (found.f_bavail - left) * PAGE_BYTES or 1)
    else:
        for number in range(found.f_favail - left):
            (filler / str(number)).touch()
    return filler


def _empty(filler: Path) -> None:
    shutil.rmtree(filler)


def main() -> None:
    disk, tries = Path(sys.argv[1]), None if sys.argv[2] == "all" else int(sys.argv[2])
    uninterrupted()  # on another disk; and all that is done once is done now
    found = {
        f"{work}, no {room} left": list(at_every_room(disk, work, room, tries)) for work in WORKS for room in ROOMS
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
