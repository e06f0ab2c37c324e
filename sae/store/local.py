"""What is particular to local files: durable renames, a create that only one writer wins, what OSErrors mean."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sae.errors import PipelineError, StoreError, TransientError

T = TypeVar("T")

_PERMANENT = (errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.ENOTSUP)


def put(source: Path, target: Path) -> None:
    """Move a finished file to `target`, replacing what is there: readers see the old file or all of the new one."""
    make_folders(target.parent)
    fsync(source)
    _across_devices(os.replace, source, target)
    fsync(target.parent)


def create(target: Path, data: bytes, scratch: Path) -> bool:
    """Write a file if there is none, by linking a finished one into place.

    Args:
        scratch: a folder for the finished file.

    Returns: False when somebody else was first.
    """
    make_folders(target.parent)
    attempt = scratch / "data"
    attempt.write_bytes(data)
    fsync(attempt)
    created = _across_devices(_link, attempt, target)
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


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by path relative to it. A file that vanishes meanwhile is left out."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = Path(place, name)
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


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
