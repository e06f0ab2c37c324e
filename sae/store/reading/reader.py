"""Activation parts to arrays: raw row groups read straight into a reused buffer, checked against their hashes.

The recorded hash of the values decides what is trusted. Bytes at the recorded offset that do not match it are read
once more; then the file may have been re-written by another tool: it is decoded by pyarrow, and the decoded values must
match.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from sae.errors import DamagedError, StoreError
from sae.store.artefacts.record import AGAIN
from sae.store.part.encoding import decode, stored_dtype
from sae.store.part.writer import IDENTITY
from sae.store.reading.rewritten import decode_identity, decode_vectors
from sae.store.snapshots.snapshot import Snapshot, SnapshotPart
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import AHEAD, LocalRanges, Range, open_ranges

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""What is read from a local file at once: it is hashed, and moved on, while it is in a core's own cache."""


class Piece(NamedTuple):
    """Vectors that lie side by side in one row group."""

    place: int
    """Which of the row groups that were asked for."""
    first: int
    """Number in the row group of the first row."""
    rows: np.ndarray
    """As stored, in memory that the next piece overwrites. [rows, d_in]"""


class RowGroupReader:
    """Reads row groups of a snapshot's parts into buffers of the caller. May be used by several threads at once."""

    def __init__(self, storage: Storage, snapshot: Snapshot) -> None:
        self._storage, self._snapshot = storage, snapshot
        self._ranges = open_ranges(storage)
        self._local = self._ranges if isinstance(self._ranges, LocalRanges) else None
        self._row_bytes = snapshot.d_in * stored_dtype(snapshot.dtype).itemsize
        self._rewritten: set[int] = set()

    @property
    def is_remote(self) -> bool:
        """Whether a read waits for a network, so that reading ahead saves time."""
        return self._ranges.is_remote

    def read_many(self, requests: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Vectors of many row groups, all of them in flight at once: (part, group, out) as for read_into.

        Raises: as read_into, for the first that fails.
        """
        self._read([self._vectors(*request) for request in requests])

    def read_into(self, part: int, group: int, out: np.ndarray) -> None:
        """Fill `out` [n_rows, d_in] (C-contiguous, stored dtype) with the vectors of one row group.

        Args:
            part: index of the part in the snapshot.

        Raises: DamagedError naming file, row group and offset when neither the raw page, read twice, nor the decoded
            column has the recorded hash; TransientError when the file cannot be read just now.
        """
        wanted = self._vectors(part, group, out)
        if self._local is None:
            self._read([wanted])
            return
        step = self.piece_rows()
        pieces = (out[first : first + step] for first in range(0, len(out), step))
        try:
            deque(self._iter_raw(self._local, wanted, pieces), maxlen=0)
        except _NotAsRecorded:
            self._read([wanted])

    def piece_rows(self, multiple: int = 1) -> int:
        """How many rows to read at once from a local file: about PIECE_BYTES, and a multiple of a number of rows."""
        return max(1, PIECE_BYTES // (self._row_bytes * multiple)) * multiple

    def iter_pieces(self, places: Sequence[tuple[int, int]], buffer: np.ndarray) -> Iterator[Piece]:
        """Vectors of many row groups (part, group), in order.

        A local file is read a buffer full at a time, and that is given out before the whole row group is checked: the
        row group comes again, whole, if it was wrong. Elsewhere row groups come whole, and as many as the buffer holds
        are in flight at once.

        Args:
            buffer: of the stored dtype; unless the root is local, for the largest row group at least. [rows, d_in]

        Raises: as read_into.
        """
        if self._local is None:
            yield from self._iter_whole(places, buffer)
            return
        ahead: deque[tuple[int, _Wanted]] = deque()
        for index, (part, group) in enumerate(places):
            wanted = self._vectors(part, group, buffer[:0])
            self._announce(self._local, wanted)
            ahead.append((index, wanted))
            if len(ahead) > AHEAD:
                yield from self._iter_one(self._local, *ahead.popleft(), buffer)
        while ahead:
            yield from self._iter_one(self._local, *ahead.popleft(), buffer)

    def _iter_one(self, local: LocalRanges, index: int, wanted: "_Wanted", buffer: np.ndarray) -> Iterator[Piece]:
        """The pieces of one row group, and it as a whole if they were wrong."""
        first, n_rows = 0, wanted.n_rows
        cut = (buffer[: n_rows - start] for start in range(0, n_rows, len(buffer)))
        try:
            for rows in self._iter_raw(local, wanted, cut):
                yield Piece(index, first, rows)
                first += len(rows)
        except _NotAsRecorded:
            whole = np.empty((n_rows, *buffer.shape[1:]), buffer.dtype)
            self._read([self._vectors(wanted.part, wanted.group, whole)])
            yield Piece(index, 0, whole)

    def _iter_whole(self, places: Sequence[tuple[int, int]], buffer: np.ndarray) -> Iterator[Piece]:
        flight: list[tuple[int, np.ndarray]] = []
        end = 0
        for index, (part, group) in enumerate(places):
            n_rows = int(self._snapshot.group_rows(part)[group])
            if end + n_rows > len(buffer):
                yield from self._land(places, flight)
                flight, end = [], 0
            flight.append((index, buffer[end : end + n_rows]))
            end += n_rows
        yield from self._land(places, flight)

    def _land(self, places: Sequence[tuple[int, int]], flight: Sequence[tuple[int, np.ndarray]]) -> Iterator[Piece]:
        self.read_many([(*places[index], rows) for index, rows in flight])
        for index, rows in flight:
            yield Piece(index, 0, rows)

    def read_act(self, part: int, group: int) -> np.ndarray:
        """The activations of one row group. [n_rows, d_in] float16 or float32, as RowBlock.act

        Raises: as read_into.
        """
        snapshot = self._snapshot
        raw = np.empty((snapshot.group_rows(part)[group], snapshot.d_in), stored_dtype(snapshot.dtype))
        self.read_into(part, group, raw)
        encoding = snapshot.parts[part].encoding
        return raw if encoding.is_plain else decode(torch.from_numpy(raw), encoding).numpy()

    def read_identity(self, part: int, group: int) -> np.ndarray:
        """Context, position and token id of the rows of one row group. [3, n_rows] int32

        Raises: as read_into.
        """
        return self.read_identities([(part, group)])[0]

    def read_identities(self, places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """As read_identity, of many row groups (part, group) at once."""
        wanted = [self._identity(*place) for place in places]
        self._read(wanted)
        return [one.out for one in wanted]

    def read_block(self, part: int, group: int, out: np.ndarray) -> np.ndarray:
        """The vectors of one row group, into `out`, and at the same time the identity of its rows.

        Returns: as read_identity.
        Raises: as read_into.
        """
        identity = self._identity(part, group)
        self._read([self._vectors(part, group, out), identity])
        return identity.out

    def close(self) -> None:
        """Close files and connections."""
        self._ranges.close()

    def _vectors(self, part: int, group: int, out: np.ndarray) -> "_Wanted":
        assert out.flags.c_contiguous, "a copy would be filled"
        place = self._snapshot.parts[part].row_group(group)
        rows = (place.n_rows, place.offset)
        return _Wanted(part, group, "vectors", *rows, _bytes(out), None, out, place.xxh3, decode_vectors)

    def _identity(self, part: int, group: int) -> "_Wanted":
        place = self._snapshot.parts[part].row_group(group)
        out = np.empty((len(IDENTITY), place.n_rows), np.int32)
        start, *_, last = place.identity
        # Pages of one row group lie side by side: one read, with two page headers between the values.
        span = memoryview(bytearray(last + out[0].nbytes - start))
        what = ", ".join(IDENTITY)
        rows = (place.n_rows, start)
        return _Wanted(part, group, what, *rows, span, place.identity, out, place.identity_xxh3, decode_identity)

    def _read(self, wanted: Sequence["_Wanted"]) -> None:
        """Raw bytes, again where their hash is wrong (a network may garble what a disk holds), then decoded."""
        raw = [one for one in wanted if one.part not in self._rewritten]
        decoded = [one for one in wanted if one.part in self._rewritten]
        for _ in range(2):
            with self._naming_missing(one.part for one in raw):
                ranges = [Range(self._path(one.part), one.offset, one.buffer) for one in raw]
                filled = self._ranges.read(ranges) if raw else []
            raw = [one for one, is_full in zip(raw, filled, strict=True) if not (is_full and one.has_arrived())]
        for one in raw + decoded:
            values = one.decode(self._storage, self._snapshot.parts[one.part], one.group)
            if values is not None:
                one.out[:] = values
            if values is None or not one.is_right():
                raise self._damaged(one)
            self._note_rewritten(one.part)

    def _iter_raw(self, local: LocalRanges, wanted: "_Wanted", pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Fill pieces, one after the other, with the raw bytes of a row group. Raises: _NotAsRecorded, at the end."""
        if wanted.part in self._rewritten:
            raise _NotAsRecorded
        with self._naming_missing([wanted.part]):
            file = local.open(self._path(wanted.part))
        offset, found = wanted.offset, xxhash.xxh3_64()
        for piece in pieces:
            data = _bytes(piece)
            if not file.fill(data, offset):
                raise _NotAsRecorded
            found.update(data)
            offset += len(data)
            yield piece
        if found.hexdigest() != wanted.xxh3:
            raise _NotAsRecorded

    def _announce(self, local: LocalRanges, wanted: "_Wanted") -> None:
        with contextlib.suppress(StoreError):  # it will be raised in its place
            local.announce(self._path(wanted.part), wanted.offset, wanted.n_rows * self._row_bytes)

    def _path(self, part: int) -> str:
        return self._snapshot.parts[part].path

    @contextlib.contextmanager
    def _naming_missing(self, parts: Iterable[int]) -> Iterator[None]:
        """A file of these parts that is not there makes the part damaged, not the store."""
        try:
            yield
        except StoreError:
            for part in parts:
                if not self._storage.exists(self._path(part)):
                    raise self._missing(part) from None
            raise

    def _damaged(self, one: "_Wanted") -> DamagedError:
        entry = self._snapshot.parts[one.part]
        return DamagedError(
            f"{self._storage.uri(entry.path)}: row group {one.group}: {one.what} ({len(one.buffer)} bytes at offset "
            f"{one.offset}) do not have their recorded hash {one.xxh3}: part {entry.part} of {entry.ref} is damaged. "
            f"{AGAIN}",
            entry.ref,
            entry.part,
        )

    def _missing(self, part: int) -> DamagedError:
        entry = self._snapshot.parts[part]
        return DamagedError(
            f"{self._storage.uri(entry.path)}: missing, though the snapshot {self._snapshot.ref} lists it as part "
            f"{entry.part} of {entry.ref}. {AGAIN}",
            entry.ref,
            entry.part,
        )

    def _note_rewritten(self, part: int) -> None:
        """Say once that a part is read the slow way."""
        if part not in self._rewritten:
            self._rewritten.add(part)
            uri = self._storage.uri(self._snapshot.parts[part].path)
            logger.warning("%s: re-written by another tool; decoded, slower than a raw read", uri)


class _NotAsRecorded(Exception):
    """Raw bytes do not have their recorded hash: they are read again, and then decoded."""


@dataclass
class _Wanted:
    """Values of one row group on their way into an array."""

    part: int
    group: int
    what: str
    """The columns, for people."""
    n_rows: int
    offset: int
    buffer: memoryview
    """For the bytes at `offset`."""
    starts: tuple[int, ...] | None
    """Where in the file the values of each row of `out` begin. None: `buffer` is the memory of `out`."""
    out: np.ndarray
    xxh3: str
    """Recorded, of the bytes of `out`."""
    decode: Callable[[Storage, SnapshotPart, int], np.ndarray | None]
    """The same values of a part that was re-written."""

    def has_arrived(self) -> bool:
        """Move what is in the buffer to `out`. Returns: whether it is right."""
        for row, start in zip(self.out, self.starts or (), strict=self.starts is not None):
            row[:] = np.frombuffer(self.buffer, row.dtype, row.size, start - self.offset)
        return self.is_right()

    def is_right(self) -> bool:
        """Whether `out` has the recorded hash."""
        return xxhash.xxh3_64_hexdigest(_bytes(self.out)) == self.xxh3


def _bytes(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
