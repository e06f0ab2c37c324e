"""Private folders for unfinished files, and the removal of those whose owner has died.

<parent>/<prefix><pid>-xxxxxxxx/
    lock      held (flock) while the owner lives; says on which kernel that is
    files/    what is given out

The kernel gives up the lock of a process that dies, however it dies, so a process id that is in use again and a
process that looks dead but is not cannot deceive. Another machine's lock may be invisible here (some network file
systems lock on one machine only): its folders are left alone unless nothing in them has changed for a week.
"""

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK, FILES = "lock", "files"
UNTOUCHED_SECONDS = 7 * 86400


@contextlib.contextmanager
def private_folder(parent: Path, prefix: str = "") -> Iterator[Path]:
    """A fresh folder inside `parent`, removed afterwards; what dead processes left there is removed once."""
    _clean_once(parent, prefix)
    outer = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    descriptor = None
    try:
        descriptor = _lock(outer)
        files = outer / FILES
        files.mkdir()
        yield files
    finally:
        shutil.rmtree(outer / FILES, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)  # before the rest: NFS cannot remove the folder of an open file
        shutil.rmtree(outer, ignore_errors=True)


def find_abandoned(parent: Path, prefix: str = "") -> list[Path]:
    """The folders in `parent` whose owner has died."""
    return [outer for outer in sorted(parent.glob(f"{prefix}[0-9]*-*")) if _is_abandoned(outer)]


def remove_abandoned(parent: Path, prefix: str = "") -> None:
    """Delete the folders in `parent` whose owner has died."""
    for outer in find_abandoned(parent, prefix):
        shutil.rmtree(outer, ignore_errors=True)


_clean_once = functools.cache(remove_abandoned)


def _lock(outer: Path) -> int:
    """Take the folder's lock. Returns: the descriptor that holds it."""
    new, place = outer / ".lock", outer / LOCK
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: age decides
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, _kernel().encode())
    os.rename(new, place)  # nobody sees it before it is locked
    return descriptor


def _is_abandoned(outer: Path) -> bool:
    try:
        descriptor = os.open(outer / LOCK, os.O_RDWR)
    except OSError:  # its owner is about to make it, or died then; or it is another user's
        return _is_untouched(outer)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 1000).decode() == _kernel():
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return _is_untouched(outer)


def _is_untouched(outer: Path) -> bool:
    """Whether nothing in the folder has changed for a week."""
    newest = 0.0
    for path in (outer, *outer.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.lstat().st_mtime)
    try:
        # Seen by the clock that dates these files: this machine's may be years ahead of a file server's.
        with tempfile.TemporaryFile(dir=outer.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:  # nothing can be written there just now
        return False
    return newest > 0 and now - newest > UNTOUCHED_SECONDS


@functools.cache
def _kernel() -> str:
    """Tells running kernels apart: containers on one machine share it, and a reboot changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
