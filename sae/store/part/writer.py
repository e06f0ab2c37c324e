"""Activation parts: rows of vectors as an ordinary Parquet file whose vectors can be read without decoding.

The contract is FORMAT.md: per row group, column `act` is one uncompressed PLAIN page whose values, the vectors, are its
last bytes and begin at a multiple of 4096. The columns that say which token a row belongs to are raw pages too. Values
are written as they lie in memory, without a copy, a block at a time, while another thread computes their checksums.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from zlib_ng.zlib_ng import crc32

from sae.config import FrozenConfig
from sae.store.part import pages
from sae.store.part.encoding import Encoding, stored_dtype
from sae.store.part.pages import IDENTITY, Chunk

__all__ = ["IDENTITY", "PartLayout", "RowGroup", "Rows", "write_part"]

BLOCK_BYTES = 1 << 20
"""Values written at once: all that is done with them is done while a cache holds them."""
BLOCKS_IN_USE = 2
"""Blocks in work at a time: one is written while the one before is hashed."""
UNFINISHED = 1
"""Row groups that may wait for their checksums while the next one is written."""


class Rows(Protocol):
    """An array of rows, or what makes some of them when it is sliced.

    A slice is in use until the second one after it is asked for (BLOCKS_IN_USE); then its memory may be used again.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, d_in]"""

    @property
    def dtype(self) -> np.dtype:
        """Of the stored values."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class RowGroup(FrozenConfig):
    """Where the rows of a row group lie."""

    offset: int
    """Of the first vector's first byte in the file."""
    n_rows: int
    xxh3: str
    """xxh3-64 of the vectors' bytes."""
    identity: tuple[int, int, int]
    """Offsets of the first values of seq, pos and token."""
    identity_xxh3: str
    """xxh3-64 of the bytes of seq, then pos, then token."""


class PartLayout(FrozenConfig):
    """What a reader needs to fetch any row group of a part with one range request."""

    n_rows: int
    d_in: int
    encoding: Encoding
    row_groups: tuple[RowGroup, ...]

    @property
    def dtype(self) -> str:
        """float16, float32, bfloat16 or int8."""
        return self.encoding.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector."""
        return self.d_in * stored_dtype(self.dtype).itemsize


def write_part(
    path: Path,
    act: Rows,
    seq: np.ndarray,
    pos: np.ndarray,
    token: np.ndarray,
    *,
    row_group_rows: int | Sequence[int],
    encoding: Encoding,
    durable: bool = False,
    alongside: Callable[[np.ndarray], None] | None = None,
) -> PartLayout:
    """Write one part. The same rows give the same bytes.

    Args:
        path: a local file in a staging folder; it must not exist.
        act: stored values, in the order they are stored. [rows, d_in] of `stored_dtype`
        seq, pos, token: identity of every row: context, position, token id. [rows] int32
        row_group_rows: rows per row group, the last one may be shorter; or the rows of every row group.
        encoding: what the stored values mean.
        durable: the file will be made to survive a power cut, so let the disk begin at once. Not for one that is read
            once and deleted.
        alongside: called in another thread with every block of values, in order, while it is written. [block, d_in]

    Returns: where the rows of each row group lie, with their hashes.
    Raises: OSError when the file cannot be written; ValueError for arrays of another dtype or length, and for a row
        group that does not fit a page (2 GiB).
    """
    n_rows, d_in = act.shape
    if act.dtype != stored_dtype(encoding.dtype):
        raise ValueError(f"values of {act.dtype}, but {encoding.dtype} is stored as {stored_dtype(encoding.dtype)}")
    if any(column.shape != (n_rows,) for column in (seq, pos, token)) or d_in == 0:
        raise ValueError(f"{n_rows} rows of {d_in} values, but seq {seq.shape}, pos {pos.shape}, token {token.shape}")
    finished: list[tuple[RowGroup, list[Chunk]]] = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write(descriptor, [pages.MAGIC], 0)
        end = len(pages.MAGIC)
        with ThreadPoolExecutor(1, thread_name_prefix="checksums") as executor:
            values = _Values(descriptor, act, executor, durable, alongside)
            unfinished: deque[_Unfinished] = deque()
            for rows in _row_groups(n_rows, row_group_rows):
                identity = np.ascontiguousarray(np.stack([seq[rows], pos[rows], token[rows]]), "<i4")
                unfinished.append(_write_group(descriptor, end, values, rows, identity, encoding.dtype))
                end = unfinished[-1].end
                if len(unfinished) > UNFINISHED:
                    finished.append(_write_head(descriptor, unfinished.popleft()))
            values.wait()
            finished += [_write_head(descriptor, group) for group in unfinished]
        _write(descriptor, [pages.footer(encoding, d_in, [(group.n_rows, chunks) for group, chunks in finished])], end)
    finally:
        os.close(descriptor)
    return PartLayout(n_rows=n_rows, d_in=d_in, encoding=encoding, row_groups=tuple(group for group, _ in finished))


def _row_groups(n_rows: int, row_group_rows: int | Sequence[int]) -> Iterator[slice]:
    """The rows of every row group. Raises: ValueError when those given are not all rows."""
    if isinstance(row_group_rows, int):
        row_group_rows = [min(row_group_rows, n_rows - start) for start in range(0, n_rows, row_group_rows)]
    if sum(row_group_rows) != n_rows:
        raise ValueError(f"row groups of {sum(row_group_rows)} rows in all, but there are {n_rows}")
    start = 0
    for size in row_group_rows:
        yield slice(start, start + size)
        start += size


class _Unfinished(NamedTuple):
    """A row group whose values are written, but not yet the header of its vectors: that needs their checksum."""

    n_rows: int
    offset: int
    """Of the vectors."""
    levels: bytes
    n_bytes: int
    """Of levels and vectors."""
    n_values: int
    hashed: Future[None]
    """Done when `checksums` are those of all values."""
    checksums: "_Checksums"
    identity: list[Chunk]
    identity_offsets: tuple[int, int, int]
    identity_xxh3: str

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.identity[-1].offset + self.identity[-1].n_bytes


class _Checksums:
    """CRC-32 of levels and vectors, and xxh3 of the vectors, block by block."""

    def __init__(self, levels: bytes) -> None:
        self.crc, self.xxh3 = crc32(levels), xxhash.xxh3_64()

    def add(self, vectors: memoryview) -> None:
        self.crc = crc32(vectors, self.crc)
        self.xxh3.update(vectors)


class _Values:
    """Writes vectors block by block; the executor's one thread does meanwhile what else is done with each."""

    def __init__(
        self,
        descriptor: int,
        act: Rows,
        executor: ThreadPoolExecutor,
        durable: bool,
        alongside: Callable[[np.ndarray], None] | None,
    ) -> None:
        self.d_in, self.row_bytes = act.shape[1], act.shape[1] * act.dtype.itemsize
        self._descriptor, self._act, self._executor, self._alongside = descriptor, act, executor, alongside
        self._durable = durable
        self._in_use: deque[Future[None]] = deque()

    def write(self, rows: slice, offset: int, checksums: _Checksums) -> Future[None]:
        """Write some rows. Returns: done when the checksums have all of them."""
        step = max(1, BLOCK_BYTES // self.row_bytes)
        for start in range(rows.start, rows.stop, step):
            if len(self._in_use) == BLOCKS_IN_USE:
                self._in_use.popleft().result()
            block = np.ascontiguousarray(self._act[start : min(start + step, rows.stop)])
            vectors = block.reshape(-1).view(np.uint8).data
            self._in_use.append(self._executor.submit(self._hash, block, vectors, checksums))
            _write(self._descriptor, [vectors], offset)
            if self._durable:
                _start_to_disk(self._descriptor, offset, len(vectors))
            offset += len(vectors)
        return self._in_use[-1]

    def wait(self) -> None:
        """Until all is done with what was written. Raises: what went wrong with it."""
        while self._in_use:
            self._in_use.popleft().result()

    def _hash(self, block: np.ndarray, vectors: memoryview, checksums: _Checksums) -> None:
        checksums.add(vectors)
        if self._alongside is not None:
            self._alongside(block)


def _write_group(
    descriptor: int, end: int, values: _Values, rows: slice, identity: np.ndarray, dtype: str
) -> _Unfinished:
    """Write one row group behind `end`, but for the page header and levels of its vectors."""
    n_rows, d_in = rows.stop - rows.start, values.d_in
    levels, n_vector_bytes = pages.list_levels(dtype, n_rows, d_in), n_rows * values.row_bytes
    n_values, n_bytes = pages.n_values(dtype, n_rows, d_in), len(levels) + n_vector_bytes
    if n_bytes > pages.MAX_PAGE_BYTES or n_values > pages.MAX_PAGE_BYTES:
        raise ValueError(f"a row group of {n_vector_bytes} bytes does not fit a page: fewer rows per row group")
    offset = pages.vectors_offset(end, levels, n_vector_bytes, n_values)
    checksums = _Checksums(levels)
    hashed = values.write(rows, offset, checksums)

    start = at = offset + n_vector_bytes
    buffers, chunks, offsets = [], [], []
    for column in identity:
        ids = column.view(np.uint8).data
        header = pages.page_header(len(ids), n_rows, crc32(ids))
        buffers += [memoryview(header), ids]
        chunks.append(Chunk(at, len(header) + len(ids), n_rows))
        offsets.append(at + len(header))
        at += len(header) + len(ids)
    _write(descriptor, buffers, start)
    return _Unfinished(
        n_rows=n_rows,
        offset=offset,
        levels=levels,
        n_bytes=n_bytes,
        n_values=n_values,
        hashed=hashed,
        checksums=checksums,
        identity=chunks,
        identity_offsets=(offsets[0], offsets[1], offsets[2]),
        identity_xxh3=xxhash.xxh3_64_hexdigest(identity.data),
    )


def _write_head(descriptor: int, group: _Unfinished) -> tuple[RowGroup, list[Chunk]]:
    """Write what lies before the vectors, when their checksum is known."""
    group.hashed.result()
    header = pages.page_header(group.n_bytes, group.n_values, group.checksums.crc)
    head = group.offset - len(group.levels) - len(header)
    _write(descriptor, [memoryview(header), memoryview(group.levels)], head)
    place = RowGroup(
        offset=group.offset,
        n_rows=group.n_rows,
        xxh3=group.checksums.xxh3.hexdigest(),
        identity=group.identity_offsets,
        identity_xxh3=group.identity_xxh3,
    )
    return place, [Chunk(head, len(header) + group.n_bytes, group.n_values), *group.identity]


def _write(descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
    left = [memoryview(buffer) for buffer in buffers]
    while left:  # one call writes at most 2 GiB
        n_bytes = os.pwritev(descriptor, left, offset)
        offset += n_bytes
        while left and n_bytes >= len(left[0]):
            n_bytes -= len(left.pop(0))
        if left:
            left[0] = left[0][n_bytes:]


def _start_to_disk(descriptor: int, offset: int, n_bytes: int) -> None:
    """Have the system begin to write these bytes to the disk, so that an fsync finds little left to do.

    They stay cached: what is on its way to the disk is not dropped, and what was just written is not there yet.
    """
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)
