"""Stored files against what their commit record says of them: size and xxh3, checked before content is trusted."""

import contextlib
import functools
import os
import time
from pathlib import Path

import xxhash

from sae.config import FrozenConfig
from sae.errors import StoreError, TransientError
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import Range, open_ranges

BLOCK_BYTES = 1 << 25
"""Read at once from S3, in pieces that come side by side: files are hashed in a stream, never held whole."""
CACHED_BYTES = 1 << 18
"""Read at once from a local disk, into the same memory, which stays in a core's own cache: twice as fast."""
SETTLED_NS = 2_000_000_000
"""Age from which a file's times can be trusted to change with its content (file systems count in up to 2 s)."""


class FileEntry(FrozenConfig):
    """One file of an artefact."""

    name: str
    n_bytes: int
    xxh3: str
    """xxh3-64 of the bytes, in hex."""


def entry_of(folder: Path, path: Path) -> FileEntry:
    """What a record says of the file `path` inside `folder`."""
    return FileEntry(name=path.relative_to(folder).as_posix(), n_bytes=path.stat().st_size, xxh3=_hash_local(path))


def stored_size(storage: Storage, path: str) -> int | None:
    """Bytes of a stored file; None when it is missing."""
    try:
        return storage.size(path)
    except StoreError:
        if storage.exists(path):  # there, and not to be looked at: not ours to repair
            raise
        return None


def size_difference(n_bytes: int | None, entry: FileEntry) -> str | None:
    """How a size (None: no such file) differs from the entry's; None when it does not."""
    if n_bytes is None:
        return "missing"
    return None if n_bytes == entry.n_bytes else f"{n_bytes} bytes, recorded {entry.n_bytes}"


def stored_difference(storage: Storage, path: str, entry: FileEntry) -> str | None:
    """How the file at `path` differs from its entry, read in full; None when it does not.

    On a local root a file that this process has read before, and that has not changed since, is not read again.

    Raises: TransientError when it cannot be read just now.
    """
    if storage.is_local:
        return local_difference(Path(storage.full(path)), entry)
    if (difference := size_difference(stored_size(storage, path), entry)) is not None:
        return difference
    if entry.n_bytes <= BLOCK_BYTES:
        return _hash_difference(xxhash.xxh3_64_hexdigest(storage.read_bytes(path, 0, BLOCK_BYTES)), entry)
    hasher = xxhash.xxh3_64()
    block = memoryview(bytearray(BLOCK_BYTES))
    with contextlib.closing(open_ranges(storage)) as reader:
        for start in range(0, entry.n_bytes, BLOCK_BYTES):
            wanted = Range(path, start, block[: entry.n_bytes - start])
            if not all(reader.read([wanted])):
                return "it became shorter while it was read"
            hasher.update(wanted.buffer)
    return _hash_difference(hasher.hexdigest(), entry)


def local_difference(path: Path, entry: FileEntry) -> str | None:
    """As `stored_difference`, for a file on this machine."""
    try:
        found = path.stat()
        if (difference := size_difference(found.st_size, entry)) is not None:
            return difference
        times = found.st_ctime_ns, found.st_mtime_ns
        settled = time.time_ns() - max(times) > SETTLED_NS
        xxh3 = _hash_unchanged(str(path), found.st_ino, *times) if settled else _hash_local(path)
    except (FileNotFoundError, NotADirectoryError):
        return size_difference(None, entry)
    except PermissionError as err:
        raise StoreError(f"{path}: permission denied ({err})") from err
    except OSError as err:
        raise TransientError(f"{path}: {err}") from err
    return _hash_difference(xxh3, entry)


def _hash_difference(xxh3: str, entry: FileEntry) -> str | None:
    return None if xxh3 == entry.xxh3 else f"content differs from the recorded hash {entry.xxh3}"


@functools.lru_cache(maxsize=1 << 14)
def _hash_unchanged(path: str, inode: int, ctime_ns: int, mtime_ns: int) -> str:
    """The hash of a file that is as old as that: read once per process."""
    return _hash_local(path)


def _hash_local(path: str | os.PathLike[str]) -> str:
    hasher, block = xxhash.xxh3_64(), memoryview(bytearray(CACHED_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n_bytes := file.readinto(block):
            hasher.update(block[:n_bytes])
    return hasher.hexdigest()
