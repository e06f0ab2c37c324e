"""Parts that another tool has written again: the values of a recorded row group, decoded as Parquet.

What was one raw page may have become compressed, dictionary-encoded, divided into other row groups, or wider (a tool
without float16 writes float32, one without fixed lengths writes plain binary). The rows and their values are the same,
and whoever asks compares their bytes with the recorded hash.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.store.artefacts.files import stored_size
from sae.store.part.encoding import stored_dtype
from sae.store.part.locate import UNDECODABLE
from sae.store.part.writer import IDENTITY
from sae.store.snapshots.snapshot import SnapshotPart
from sae.store.storage.filesystem import Storage


def decode_vectors(storage: Storage, entry: SnapshotPart, group: int) -> np.ndarray | None:
    """The vectors of one recorded row group. Not to be trusted before their hash was compared.

    Returns: [n_rows, d_in] of `stored_dtype`; None when the file is no readable Parquet file with such values.
    """
    layout = entry.layout
    dtype, shape = stored_dtype(layout.dtype), (layout.row_groups[group].n_rows, layout.d_in)
    try:
        (column,) = _read_columns(storage, entry, group, ("act",)) or (None,)
        if column is None:
            return None
        if _is_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            return values.astype(dtype).reshape(shape) if dtype.kind == values.dtype.kind == "f" else None
        rows = column.cast(pa.binary(layout.row_bytes))
        start = rows.offset * layout.row_bytes
        return np.frombuffer(rows.buffers()[1], dtype, shape[0] * shape[1], start).reshape(shape)
    except UNDECODABLE:
        return None


def decode_identity(storage: Storage, entry: SnapshotPart, group: int) -> np.ndarray | None:
    """Context, position and token id of the rows of one row group, as `decode_vectors`. [3, n_rows] int32"""
    try:
        columns = _read_columns(storage, entry, group, IDENTITY)
        if columns is None:
            return None
        decoded = np.stack([column.to_numpy(zero_copy_only=False) for column in columns])
    except UNDECODABLE:
        return None
    return decoded if decoded.dtype == np.int32 else None


def _read_columns(storage: Storage, entry: SnapshotPart, group: int, names: Sequence[str]) -> list[pa.Array] | None:
    """Columns of one recorded row group, found by row number; None when the file is missing.

    Raises: UNDECODABLE.
    """
    n_bytes = stored_size(storage, entry.path)
    if n_bytes is None:
        return None
    first = sum(place.n_rows for place in entry.layout.row_groups[:group])
    n_rows = entry.layout.row_groups[group].n_rows
    with pq.ParquetFile(_StoredFile(storage, entry.path, n_bytes)) as file:
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = [i for i, size in enumerate(sizes) if ends[i] > first and ends[i] - size < first + n_rows]
        table = file.read_row_groups(groups, columns=list(names))
    table = table.slice(first - int(ends[groups[0]] - sizes[groups[0]]), n_rows)
    return [table[name].combine_chunks() for name in names]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


class _StoredFile(io.RawIOBase):
    """A stored part as pyarrow reads it: footer and ranges, never the whole of it."""

    def __init__(self, storage: Storage, path: str, n_bytes: int) -> None:
        self._storage, self._path, self._n_bytes, self._position = storage, path, n_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._n_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._n_bytes)
        if end <= self._position:
            return 0
        data = self._storage.read_bytes(self._path, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
