"""Many parts as columns of numpy; what snapshots and indexes of parts are made of.

A million parts of 32 row groups take 1.2 GB in memory and half of that on disk, which is what their hashes take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.record import Record
from sae.store.part.encoding import Dtype, Encoding
from sae.store.part.writer import PartLayout, RowGroup

PART_FILE = "part.parquet"


@dataclass(frozen=True, eq=False)
class PartTable:
    """Parts in order, of one width and dtype. The row groups of all parts lie side by side, part after part."""

    d_in: int
    dtype: Dtype
    refs: tuple[str, ...]
    """Part sets."""
    part_set: np.ndarray
    """Of every part, an index into `refs`. [parts] int32"""
    part: np.ndarray
    """Number of the part in its set. [parts] int32"""
    n_rows: np.ndarray
    """[parts] int64"""
    n_bytes: np.ndarray
    """Of the Parquet file. [parts] int64"""
    content: np.ndarray
    """Digest that the folder of the file is named by. [parts] uint64"""
    exponent: np.ndarray
    """Of float16: value = stored * 2**exponent. [parts] int32"""
    starts: np.ndarray
    """Where a part's row groups begin; the end of the last one's at the end. [parts + 1] int64"""
    group_rows: np.ndarray
    """[groups] int32"""
    offsets: np.ndarray
    """Of the first vector, seq, pos and token of every row group. [4, groups] uint32, or uint64 for large files"""
    hashes: np.ndarray
    """xxh3-64 of the vectors, and of the identity. [2, groups] uint64"""

    def __len__(self) -> int:
        return len(self.part)

    def path(self, index: int) -> str:
        """Of a part's Parquet file, relative to the root."""
        ref, part = self.refs[self.part_set[index]], int(self.part[index])
        return f"{layout.content_folder(ref, f'{self.content[index]:016x}', part)}/{PART_FILE}"

    def encoding(self, index: int) -> Encoding | None:
        """What a part's stored values mean; None for int8, whose scales and offsets only the part's record holds."""
        return None if self.dtype == "int8" else Encoding(dtype=self.dtype, exponent=int(self.exponent[index]))

    def layout(self, index: int, encoding: Encoding) -> PartLayout:
        """Where a part's row groups lie, and what its stored values mean."""
        row_groups = self._row_groups(slice(int(self.starts[index]), int(self.starts[index + 1])))
        return PartLayout(n_rows=int(self.n_rows[index]), d_in=self.d_in, encoding=encoding, row_groups=row_groups)

    def row_group(self, index: int, group: int) -> RowGroup:
        """One of a part's row groups."""
        place = int(self.starts[index]) + range(int(self.starts[index + 1] - self.starts[index]))[group]
        return self._row_groups(slice(place, place + 1))[0]

    def _row_groups(self, groups: slice) -> tuple[RowGroup, ...]:
        columns = (self.group_rows[groups], self.offsets[:, groups].T, self.hashes[:, groups].T)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return tuple(
            RowGroup(
                offset=offsets[0],
                n_rows=n_rows,
                xxh3=f"{xxh3:016x}",
                identity=tuple(offsets[1:]),
                identity_xxh3=f"{identity_xxh3:016x}",
            )
            for n_rows, offsets, (xxh3, identity_xxh3) in rows
        )

    def slice(self, start: int, stop: int) -> "PartTable":
        """The parts [start, stop)."""
        parts = slice(start, stop)
        first, last = (int(end) for end in self.starts[[start, stop]])
        return PartTable(
            d_in=self.d_in,
            dtype=self.dtype,
            refs=self.refs,
            part_set=self.part_set[parts],
            part=self.part[parts],
            n_rows=self.n_rows[parts],
            n_bytes=self.n_bytes[parts],
            content=self.content[parts],
            exponent=self.exponent[parts],
            starts=self.starts[start : stop + 1] - first,
            group_rows=self.group_rows[first:last],
            offsets=self.offsets[:, first:last],
            hashes=self.hashes[:, first:last],
        )


def table_of(records: Sequence[Record]) -> PartTable:
    """The parts that records speak of, in their order. There is at least one.

    Raises: StoreError when they differ in width or dtype.
    """
    layouts = [PartLayout.model_validate(record.metrics["layout"]) for record in records]
    entries = [next(entry for entry in record.files if entry.name == PART_FILE) for record in records]
    groups = [group for each in layouts for group in each.row_groups]
    offsets = [[group.offset, *group.identity] for group in groups]
    hashes = [[int(group.xxh3, 16), int(group.identity_xxh3, 16)] for group in groups]
    refs = tuple(dict.fromkeys(record.ref for record in records))
    number = {ref: index for index, ref in enumerate(refs)}
    sizes = np.array([len(each.row_groups) for each in layouts], np.int64)
    for record, each in zip(records, layouts, strict=True):
        check_alike(record.ref, each.d_in, each.dtype, records[0].ref, layouts[0].d_in, layouts[0].dtype)
    return PartTable(
        d_in=layouts[0].d_in,
        dtype=layouts[0].encoding.dtype,
        refs=refs,
        part_set=np.array([number[record.ref] for record in records], np.int32),
        part=np.array([record.part or 0 for record in records], np.int32),
        n_rows=np.array([each.n_rows for each in layouts], np.int64),
        n_bytes=np.array([entry.n_bytes for entry in entries], np.int64),
        content=np.array([int(record.content, 16) for record in records], np.uint64),
        exponent=np.array([each.encoding.exponent for each in layouts], np.int32),
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        group_rows=np.array([group.n_rows for group in groups], np.int32),
        offsets=np.array(offsets, offset_dtype(max(entry.n_bytes for entry in entries))).reshape(-1, 4).T,
        hashes=np.array(hashes, np.uint64).reshape(-1, 2).T,
    )


def joined(tables: Sequence[PartTable]) -> PartTable:
    """The parts of several tables, one table after the other. There is at least one.

    Raises: StoreError when they differ in width or dtype.
    """
    first = tables[0]
    refs = tuple(dict.fromkeys(ref for table in tables for ref in table.refs))
    for table in tables:
        check_alike(table.refs[0], table.d_in, table.dtype, first.refs[0], first.d_in, first.dtype)
    numbers = [np.array([refs.index(ref) for ref in table.refs], np.int32)[table.part_set] for table in tables]
    sizes = np.concatenate([np.diff(table.starts) for table in tables])
    return PartTable(
        d_in=first.d_in,
        dtype=first.dtype,
        refs=refs,
        part_set=np.concatenate(numbers),
        part=np.concatenate([table.part for table in tables]),
        n_rows=np.concatenate([table.n_rows for table in tables]),
        n_bytes=np.concatenate([table.n_bytes for table in tables]),
        content=np.concatenate([table.content for table in tables]),
        exponent=np.concatenate([table.exponent for table in tables]),
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        group_rows=np.concatenate([table.group_rows for table in tables]),
        offsets=np.concatenate([table.offsets for table in tables], axis=1),
        hashes=np.concatenate([table.hashes for table in tables], axis=1),
    )


def offset_dtype(n_bytes: int) -> type[np.unsignedinteger]:
    """What holds every offset in files of so many bytes."""
    return np.uint32 if n_bytes <= np.iinfo(np.uint32).max else np.uint64


def check_alike(ref: str, d_in: int, dtype: str, other_ref: str, other_d_in: int, other_dtype: str) -> None:
    """Raises: StoreError when two sets differ in width or dtype."""
    if (d_in, dtype) != (other_d_in, other_dtype):
        raise StoreError(
            f"{ref} holds {dtype} vectors of width {d_in}, {other_ref} {other_dtype} vectors of width {other_d_in}: "
            f"a snapshot has one kind. Extract all segments with the same activations.dtype and hook point."
        )
