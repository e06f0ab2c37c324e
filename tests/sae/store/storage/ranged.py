"""Files of random bytes, and ranges of them."""

import contextlib
import random

from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import Range, open_ranges


def fill(storage: Storage, n_files: int = 3, n_bytes: int = 100_000) -> dict[str, bytes]:
    """Files of random bytes, by path."""
    files = {f"folder/file-{index}": random.Random(index).randbytes(n_bytes) for index in range(n_files)}
    for path, data in files.items():
        storage.replace(path, data)
    return files


def read(storage: Storage, *wanted: tuple[str, int, int]) -> list[bytes | None]:
    """The bytes [start, stop) of files; None where the file ends before."""
    buffers = [bytearray(stop - start) for _, start, stop in wanted]
    with contextlib.closing(open_ranges(storage)) as reader:
        filled = reader.read(
            [Range(path, start, memoryview(b)) for (path, start, _), b in zip(wanted, buffers, strict=True)]
        )
    return [bytes(buffer) if is_full else None for buffer, is_full in zip(buffers, filled, strict=True)]
