"""Every row of a snapshot once, in file order, with what it is of."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sae.store.part.encoding import decode, stored_dtype
from sae.store.reading.reader import RowGroupReader
from sae.store.snapshots.snapshot import Snapshot
from sae.store.storage.filesystem import Storage
from sae.store.threads import in_order

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
