"""Activation parts to arrays: raw row groups read straight into a reused buffer, checked against their hashes.

The recorded hash of the values decides what is trusted. When the bytes at the recorded offset do not match it, the
file may have been re-written by another tool: it is decoded by pyarrow, and the decoded values must match instead.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from sae.errors import DamagedError, StoreError, TransientError
from sae.store.encoding import decode, stored_dtype
from sae.store.filesystem import Storage
from sae.store.record import AGAIN
from sae.store.rewritten import decode_identity, decode_vectors
from sae.store.snapshot import Snapshot, read_snapshot
from sae.store.writer import IDENTITY

__all__ = ["RowBlock", "RowGroupReader", "iter_rows", "read_snapshot"]

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 64


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
    """Reads row groups of a snapshot's parts into buffers of the caller. Not thread-safe: one per thread."""

    def __init__(self, storage: Storage, snapshot: Snapshot) -> None:
        self._storage, self._snapshot = storage, snapshot
        self._files: OrderedDict[int, int] = OrderedDict()
        self._rewritten: set[int] = set()

    def read_into(self, part: int, group: int, out: np.ndarray) -> None:
        """Fill `out` [n_rows, d_in] (C-contiguous, stored dtype) with the vectors of one row group.

        Args:
            part: index of the part in the snapshot.

        Raises: DamagedError naming file, row group and offset when neither the raw page nor the decoded column has
            the recorded hash; TransientError when the file cannot be read just now.
        """
        place = self._snapshot.parts[part].layout.row_groups[group]
        buffer = out.reshape(-1).view(np.uint8).data
        if self._read_raw(part, place.offset, buffer) and xxhash.xxh3_64_hexdigest(buffer) == place.xxh3:
            return
        decoded = decode_vectors(self._storage, self._snapshot.parts[part], group)
        if decoded is not None:
            out[:] = decoded
            if xxhash.xxh3_64_hexdigest(buffer) == place.xxh3:
                self._note_rewritten(part)
                return
        raise self._damaged(part, group, "vectors", len(buffer), place.offset, place.xxh3)

    def read_act(self, part: int, group: int) -> np.ndarray:
        """The activations of one row group. [n_rows, d_in] float16 or float32, as RowBlock.act

        Raises: as read_into.
        """
        layout = self._snapshot.parts[part].layout
        raw = np.empty((layout.row_groups[group].n_rows, layout.d_in), stored_dtype(layout.dtype))
        self.read_into(part, group, raw)
        return raw if layout.encoding.is_plain else decode(torch.from_numpy(raw), layout.encoding).numpy()

    def read_identity(self, part: int, group: int) -> np.ndarray:
        """Context, position and token id of the rows of one row group. [3, n_rows] int32

        Raises: as read_into.
        """
        place = self._snapshot.parts[part].layout.row_groups[group]
        out = np.empty((len(IDENTITY), place.n_rows), np.int32)
        start = place.identity[0]
        # Pages of one row group lie side by side: one read, with two page headers between the values.
        span = bytearray(place.identity[-1] + out[0].nbytes - start)
        if self._read_raw(part, start, memoryview(span)):
            for column, offset in zip(out, place.identity, strict=True):
                column[:] = np.frombuffer(span, np.int32, place.n_rows, offset - start)
            if xxhash.xxh3_64_hexdigest(out.data) == place.identity_xxh3:
                return out
        decoded = decode_identity(self._storage, self._snapshot.parts[part], group)
        if decoded is not None and xxhash.xxh3_64_hexdigest(decoded.data) == place.identity_xxh3:
            self._note_rewritten(part)
            return decoded
        raise self._damaged(part, group, ", ".join(IDENTITY), len(span), start, place.identity_xxh3)

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _damaged(self, part: int, group: int, what: str, n_bytes: int, offset: int, xxh3: str) -> DamagedError:
        entry = self._snapshot.parts[part]
        return DamagedError(
            f"{self._storage.uri(entry.path)}: row group {group}: {what} ({n_bytes} bytes at offset {offset}) do not "
            f"have their recorded hash {xxh3}: part {entry.part} of {entry.ref} is damaged. {AGAIN}",
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

    def _read_raw(self, part: int, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes at `offset`. Returns: False when the file ends before."""
        path = self._snapshot.parts[part].path
        if not self._storage.is_local:
            return self._read_range(part, path, offset, buffer)
        descriptor = self._descriptor(part, path)
        done = 0
        while done < len(buffer):  # one call reads at most 2 GiB
            try:
                n_bytes = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as err:
                raise TransientError(f"{self._storage.uri(path)}: {err}") from err
            if n_bytes == 0:
                return False
            done += n_bytes
        return True

    def _read_range(self, part: int, path: str, offset: int, buffer: memoryview) -> bool:
        try:
            data = self._storage.read_bytes(path, start=offset, end=offset + len(buffer))
        except StoreError:
            if self._storage.exists(path):
                raise
            raise self._missing(part) from None
        if len(data) != len(buffer):
            return False
        buffer[:] = data
        return True

    def _descriptor(self, part: int, path: str) -> int:
        if part in self._files:
            self._files.move_to_end(part)
            return self._files[part]
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[part] = os.open(self._storage.full(path), os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(part) from None
        except PermissionError as err:
            raise StoreError(f"{self._storage.uri(path)}: permission denied ({err})") from err
        except OSError as err:
            raise TransientError(f"{self._storage.uri(path)}: {err}") from err
        return self._files[part]

    def _note_rewritten(self, part: int) -> None:
        """Say once that a part is read the slow way."""
        if part not in self._rewritten:
            self._rewritten.add(part)
            uri = self._storage.uri(self._snapshot.parts[part].path)
            logger.warning("%s: re-written by another tool; decoded, slower than a raw read", uri)


def iter_rows(storage: Storage, snapshot: Snapshot, parts: Sequence[int] | None = None) -> Iterator[RowBlock]:
    """Every row once, in file order, one row group at a time: for evaluation and statistics.

    Args:
        parts: indices of parts in the snapshot; all by default.

    Raises: DamagedError as RowGroupReader.read_into.
    """
    reader = RowGroupReader(storage, snapshot)
    largest = max((n for groups in snapshot.row_groups for n in groups), default=0)
    buffer = np.empty((largest, snapshot.d_in), stored_dtype(snapshot.dtype))
    decoded = torch.empty(0, snapshot.d_in)
    try:
        for part in range(len(snapshot.parts)) if parts is None else parts:
            layout = snapshot.parts[part].layout
            for group, place in enumerate(layout.row_groups):
                act = buffer[: place.n_rows]
                reader.read_into(part, group, act)
                if not layout.encoding.is_plain:
                    decoded = decoded if len(decoded) else torch.empty(buffer.shape)
                    act = decode(torch.from_numpy(act), layout.encoding, decoded[: place.n_rows]).numpy()
                yield RowBlock(act, *reader.read_identity(part, group))
    finally:
        reader.close()
