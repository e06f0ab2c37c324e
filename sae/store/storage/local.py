"""What is particular to local files: durable renames, a create that only one writer wins, what OSErrors mean."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sae.errors import PipelineError, StoreError, TransientError

T = TypeVar("T")

_MOST_TRIES = 100
_PERMANENT = (errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.ENOTSUP)


def put(source: Path, target: Path) -> None:
    """Move a finished file to `target`, replacing what is there: readers see the old file or all of the new one."""
    fsync(source)
    _in_folder(os.replace, source, target)
    fsync(target.parent)


def create(target: Path, data: bytes, scratch: Path) -> bool:
    """Write a file if there is none, by linking a finished one into place.

    Args:
        scratch: a folder for the finished file.

    Returns: False when somebody else was first.
    """
    attempt = scratch / "data"
    attempt.write_bytes(data)
    fsync(attempt)
    created = _in_folder(_link, attempt, target)
    fsync(target.parent)
    return created


def make_folders(folder: Path) -> None:
    """Create a folder and its parents, so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as err:
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(folder)) from err
    fsync(folder.parent)


def fsync(place: Path) -> None:
    """Make a file's bytes, or a rename or a link inside a folder, survive a power cut."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Path, bytes and time of every file below `folder`: the later of its content's and its name's last change."""
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(place, name)
                found = os.stat(path)
                # A file that is moved here keeps the time of its content.
                yield path, found.st_size, max(found.st_mtime, found.st_ctime)


def remove_empty_folders(folder: Path) -> None:
    """Delete `folder` if no file is below it, and those inside it; not those that somebody holds."""
    for place, _, _ in os.walk(folder, topdown=False):
        with taking(Path(place)) as taken, contextlib.suppress(OSError):
            if taken:
                os.rmdir(place)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make `folder` and hold a shared lock of it."""
    descriptor = None
    while descriptor is None:
        make_folders(folder)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            _lock(descriptor, fcntl.LOCK_SH)
            if not _is_at(descriptor, folder):  # it was emptied and deleted before the lock was ours
                os.close(descriptor)
                descriptor = None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def taking(folder: Path) -> Iterator[bool]:
    """Hold the exclusive lock of `folder`. Yields: False when others hold one, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        yield _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(descriptor, folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Lock an open folder. Returns: False when others hold it; True also where folders cannot be locked."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def free_bytes(place: Path) -> int | None:
    """Free bytes on the device of `place`, or of the nearest folder above that exists."""
    for folder in (place, *place.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def as_error(err: Exception, uri: str, place: Path) -> PipelineError:
    """An OSError as one of ours: what may pass is a TransientError, the rest a StoreError.

    Args:
        uri: what was read or written.
        place: a folder on the device that holds it, for what a full disk says.
    """
    if is_disk_full(err):
        return disk_full(err, place)
    if isinstance(err, FileNotFoundError):
        return StoreError(f"{uri}: no such file")
    named = getattr(err, "filename", None)
    what = f"{named or uri}: {getattr(err, 'strerror', None) or err}"
    if isinstance(err, PermissionError) or getattr(err, "errno", None) in _PERMANENT:
        return StoreError(what)
    return TransientError(what)


def is_disk_full(err: Exception) -> bool:
    """Whether a write found no room. safetensors says so in words only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(err, "errno", None) in numbers or any(f"(os error {number})" in str(err) for number in numbers)


def disk_full(err: Exception, place: Path) -> StoreError:
    """The error for a write that found no room, on the device of `place`."""
    free = free_bytes(place)
    left = f"{free / 2**20:,.1f} MiB free" if free is not None else "free space unknown"
    what = "disk quota used up" if getattr(err, "errno", None) == errno.EDQUOT else "disk full"
    return StoreError(
        f"{place}: {what} ({left}). Free some space and run the same command again; what was finished is kept."
    )


def _in_folder(how: Callable[[Path, Path], T], source: Path, target: Path) -> T:
    """`how` from `source` to `target` in a folder that is made first, and again when a collector found it empty."""
    for _ in range(_MOST_TRIES):
        make_folders(target.parent)
        try:
            return _across_devices(how, source, target)
        except FileNotFoundError:
            if not source.exists():
                raise
    return _across_devices(how, source, target)


def _across_devices(how: Callable[[Path, Path], T], source: Path, target: Path) -> T:
    """`how` (a rename or a link) from `source` to `target`; by way of a copy when they are on different devices.

    A process killed while it copies leaves a dot file beside the target, which no listing shows.
    """
    try:
        return how(source, target)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        shutil.copyfile(source, beside)
        fsync(beside)
        return how(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        # NFS: the answer to the first request was lost, and the second found our own link.
        return source.stat().st_nlink > 1
    except OSError as err:
        if err.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            reason = "this file system has no hard links, which exclusive create needs"
            raise OSError(errno.ENOTSUP, reason, str(target)) from err
        raise
    return True
