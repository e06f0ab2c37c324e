"""Activation parts to arrays: raw row groups read straight into a reused buffer, checked against their hashes.

The recorded hash of the values decides what is trusted. Bytes at the recorded offset that do not match it are read
once more; then the file may have been re-written by another tool: it is decoded by pyarrow, and the decoded values must
match.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
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
from sae.store.snapshots.snapshot import Snapshot, SnapshotPart, read_snapshot
from sae.store.storage.filesystem import Storage
from sae.store.storage.ranges import Range, open_ranges
from sae.store.threads import in_order

__all__ = ["RowBlock", "RowGroupReader", "iter_rows", "read_snapshot"]

logger = logging.getLogger(__name__)

READ_AHEAD = 2
"""Row groups that iter_rows reads in advance on S3: one is on its way while another waits."""


class RowBlock(NamedTuple):
    """Rows of one row group, in file order. `act` is a view of a buffer that the next block overwrites."""

    act: np.ndarray
    """[rows, d_in] float16 or float32: as stored where that is plain, else decoded to float32."""
    seq: np.ndarray
    """Context of every row. [rows] int32"""
    pos: np.ndarray
    """Position in the context. [rows] int32"""
    token: np.ndarray
    """Token id, -1 where there is no text. [rows] int32"""


class RowGroupReader:
    """Reads row groups of a snapshot's parts into buffers of the caller. May be used by several threads at once."""

    def __init__(self, storage: Storage, snapshot: Snapshot) -> None:
        self._storage, self._snapshot = storage, snapshot
        self._ranges = open_ranges(storage)
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
        self._read([self._vectors(part, group, out)])

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
        return _Wanted(part, group, "vectors", place.offset, _bytes(out), None, out, place.xxh3, decode_vectors)

    def _identity(self, part: int, group: int) -> "_Wanted":
        place = self._snapshot.parts[part].row_group(group)
        out = np.empty((len(IDENTITY), place.n_rows), np.int32)
        start, *_, last = place.identity
        # Pages of one row group lie side by side: one read, with two page headers between the values.
        span = memoryview(bytearray(last + out[0].nbytes - start))
        what = ", ".join(IDENTITY)
        return _Wanted(part, group, what, start, span, place.identity, out, place.identity_xxh3, decode_identity)

    def _read(self, wanted: Sequence["_Wanted"]) -> None:
        """Raw bytes, again where their hash is wrong (a network may garble what a disk holds), then decoded."""
        raw = [one for one in wanted if one.part not in self._rewritten]
        decoded = [one for one in wanted if one.part in self._rewritten]
        for _ in range(2):
            filled = self._fetch(raw) if raw else []
            raw = [one for one, is_full in zip(raw, filled, strict=True) if not (is_full and one.has_arrived())]
        for one in raw + decoded:
            values = one.decode(self._storage, self._snapshot.parts[one.part], one.group)
            if values is not None:
                one.out[:] = values
            if values is None or not one.is_right():
                raise self._damaged(one)
            self._note_rewritten(one.part)

    def _fetch(self, wanted: Sequence["_Wanted"]) -> list[bool]:
        """Fill the buffers with the bytes at the recorded offsets. Returns: False where the file ends before."""
        paths = {one.part: self._snapshot.parts[one.part].path for one in wanted}
        try:
            return self._ranges.read([Range(paths[one.part], one.offset, one.buffer) for one in wanted])
        except StoreError:
            for part, path in paths.items():
                if not self._storage.exists(path):
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


@dataclass
class _Wanted:
    """Values of one row group on their way into an array."""

    part: int
    group: int
    what: str
    """The columns, for people."""
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


def iter_rows(storage: Storage, snapshot: Snapshot, parts: Sequence[int] | None = None) -> Iterator[RowBlock]:
    """Every row once, in file order, one row group at a time: for evaluation and statistics.

    On S3 the next READ_AHEAD row groups are read while the caller works on one.

    Args:
        parts: indices of parts in the snapshot; all by default.

    Raises: DamagedError as RowGroupReader.read_into.
    """
    places = (
        (part, group)
        for part in (range(len(snapshot.parts)) if parts is None else parts)
        for group in range(len(snapshot.group_rows(part)))
    )
    decoded = torch.empty(0)
    reader = RowGroupReader(storage, snapshot)
    try:
        for part, act, identity in _iter_raw(reader, snapshot, places):
            encoding = snapshot.parts[part].encoding
            if not encoding.is_plain:
                decoded = decoded if len(decoded) >= len(act) else torch.empty(act.shape)
                act = decode(torch.from_numpy(act), encoding, decoded[: len(act)]).numpy()
            yield RowBlock(act, *identity)
    finally:
        reader.close()


def _iter_raw(
    reader: RowGroupReader, snapshot: Snapshot, places: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Part, stored vectors and identity of these row groups, in order. The vectors' buffers take turns."""
    n_ahead = READ_AHEAD if reader.is_remote else 0
    largest = int(snapshot.group_rows_flat.max(initial=0))
    buffers = np.empty((n_ahead + 1, largest, snapshot.d_in), stored_dtype(snapshot.dtype))

    def read(numbered: tuple[int, tuple[int, int]]) -> tuple[int, np.ndarray, np.ndarray]:
        index, (part, group) = numbered
        act = buffers[index % len(buffers), : snapshot.group_rows(part)[group]]
        return part, act, reader.read_block(part, group, act)

    if n_ahead == 0:
        yield from map(read, enumerate(places))
    else:
        yield from in_order(read, enumerate(places), n_ahead, "read-ahead", at_once=len(buffers))
