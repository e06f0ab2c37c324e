"""Many parts as columns: numpy in memory, Parquet on disk; what snapshots and indexes of parts are made of.

A million parts of 32 row groups take 1.2 GB in memory and half of that on disk, which is what their hashes take.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.errors import StoreError
from sae.store import layout
from sae.store.artefacts.record import Record
from sae.store.part.encoding import Dtype, Encoding
from sae.store.part.writer import PartLayout, RowGroup

PART_FILE = "part.parquet"
PARTS_AT_ONCE = 1 << 14
"""Rows of a row group of the table on disk: what is written or read at once, some 30 MB."""

_PART_COLUMNS = {
    "part_set": pa.string(),
    "part": pa.int32(),
    "n_rows": pa.int64(),
    "n_bytes": pa.int64(),
    "content": pa.uint64(),
    "exponent": pa.int32(),
}
_GROUP_COLUMNS = {
    "group_rows": pa.int32(),
    "act_offset": pa.int64(),
    "seq_offset": pa.int64(),
    "pos_offset": pa.int64(),
    "token_offset": pa.int64(),
    "act_xxh3": pa.uint64(),
    "identity_xxh3": pa.uint64(),
}
_OFFSETS = ("act_offset", "seq_offset", "pos_offset", "token_offset")
_HASHES = ("content", "act_xxh3", "identity_xxh3")
"""What a dictionary cannot make smaller."""
_SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in _PART_COLUMNS.items()]
    + [
        pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)
        for name, kind in _GROUP_COLUMNS.items()
    ]
)


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
        _check_alike(record.ref, each.d_in, each.dtype, records[0].ref, layouts[0].d_in, layouts[0].dtype)
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
        offsets=np.array(offsets, _offset_dtype(max(entry.n_bytes for entry in entries))).reshape(-1, 4).T,
        hashes=np.array(hashes, np.uint64).reshape(-1, 2).T,
    )


def joined(tables: Sequence[PartTable]) -> PartTable:
    """The parts of several tables, one table after the other. There is at least one.

    Raises: StoreError when they differ in width or dtype.
    """
    first = tables[0]
    refs = tuple(dict.fromkeys(ref for table in tables for ref in table.refs))
    for table in tables:
        _check_alike(table.refs[0], table.d_in, table.dtype, first.refs[0], first.d_in, first.dtype)
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


def write_tables(where: Path | BinaryIO, tables: Iterable[PartTable], metadata: dict[str, str] | None = None) -> int:
    """Write tables as one Parquet file. The same parts give the same bytes, however they are divided into tables.

    Args:
        tables: one after the other; no more than PARTS_AT_ONCE parts and one table are held. There is at least one.
        metadata: more of it beside the width and the dtype.

    Returns: how many parts were written.
    Raises: StoreError when the tables differ in width or dtype.
    """
    first, n_parts = None, 0
    with contextlib.ExitStack() as opened:
        for table in _in_blocks(tables):
            if first is None:
                first = table
                writer = opened.enter_context(_writer(where))
                known = {"sae.d_in": str(table.d_in), "sae.dtype": table.dtype}
                writer.add_key_value_metadata(known | (metadata or {}))
            _check_alike(table.refs[0], table.d_in, table.dtype, first.refs[0], first.d_in, first.dtype)
            writer.write_table(_to_arrow(table), row_group_size=PARTS_AT_ONCE)
            n_parts += len(table)
    return n_parts


def _writer(where: Path | BinaryIO) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        where,
        _SCHEMA,
        compression="zstd",
        compression_level=1,
        use_dictionary=[_leaf(name) for name in _SCHEMA.names if name not in _HASHES],
        write_statistics=False,
        store_schema=False,
    )


def read_table(source: Path | BinaryIO) -> tuple[PartTable, dict[str, str]]:
    """A table from its file, and the file's metadata, by name.

    Memory: the table, and PARTS_AT_ONCE parts of it once more.
    """
    with pq.ParquetFile(source) as file:
        about = file.metadata
        metadata = {name.decode(): value.decode() for name, value in (about.metadata or {}).items()}
        of_parts = file.read(columns=list(_PART_COLUMNS))
        numbers = {name: of_parts[name].to_numpy() for name in _PART_COLUMNS if name != "part_set"}
        # Parquet counts a part without row groups as one value here: these are at least as many as there are.
        blocks = [about.row_group(index) for index in range(about.num_row_groups)]
        n_most = sum(block.column(len(_PART_COLUMNS)).num_values for block in blocks)
        group_rows = np.empty(n_most, np.int32)
        offsets = np.empty((len(_OFFSETS), n_most), _offset_dtype(int(numbers["n_bytes"].max(initial=0))))
        hashes = np.empty((2, n_most), np.uint64)
        sizes, n_groups = [np.zeros(1, np.int64)], 0
        for index in range(about.num_row_groups):
            block = file.read_row_group(index, columns=list(_GROUP_COLUMNS))
            sizes.append(pc.list_value_length(block["group_rows"]).to_numpy())
            here = slice(n_groups, n_groups + int(sizes[-1].sum()))
            for out, name in zip((group_rows, *offsets, *hashes), _GROUP_COLUMNS, strict=True):
                out[here] = pc.list_flatten(block[name]).to_numpy()
            n_groups = here.stop
    refs = tuple(pc.unique(of_parts["part_set"]).to_pylist())
    table = PartTable(
        d_in=int(metadata["sae.d_in"]),
        dtype=cast(Dtype, metadata["sae.dtype"]),
        refs=refs,
        part_set=pc.index_in(of_parts["part_set"], pa.array(refs)).to_numpy(),
        part=numbers["part"],
        n_rows=numbers["n_rows"],
        n_bytes=numbers["n_bytes"],
        content=numbers["content"],
        exponent=numbers["exponent"],
        starts=np.cumsum(np.concatenate(sizes), dtype=np.int64),
        group_rows=group_rows[:n_groups],
        offsets=offsets[:, :n_groups],
        hashes=hashes[:, :n_groups],
    )
    return table, metadata


def _in_blocks(tables: Iterable[PartTable]) -> Iterator[PartTable]:
    """The same parts in tables of PARTS_AT_ONCE; the last may be smaller."""
    waiting: list[PartTable] = []
    for table in tables:
        waiting.append(table)
        n_waiting = sum(map(len, waiting))
        while n_waiting >= PARTS_AT_ONCE:
            block = joined(waiting)
            yield block.slice(0, PARTS_AT_ONCE)
            waiting = [block.slice(PARTS_AT_ONCE, len(block))]
            n_waiting = len(waiting[0])
    if sum(map(len, waiting)):
        yield joined(waiting)


def _to_arrow(table: PartTable) -> pa.Table:
    sets = pa.DictionaryArray.from_arrays(table.part_set, pa.array(table.refs)).cast(pa.string())
    parts = [sets] + [pa.array(getattr(table, name), _PART_COLUMNS[name]) for name in list(_PART_COLUMNS)[1:]]
    starts = pa.array(table.starts, pa.int32())
    groups = [
        pa.ListArray.from_arrays(starts, pa.array(column, kind), type=_SCHEMA.field(name).type)
        for (name, kind), column in zip(
            _GROUP_COLUMNS.items(), (table.group_rows, *table.offsets, *table.hashes), strict=True
        )
    ]
    return pa.Table.from_arrays(parts + groups, schema=_SCHEMA)


def _leaf(name: str) -> str:
    """A column as Parquet names it."""
    return f"{name}.list.element" if name in _GROUP_COLUMNS else name


def _offset_dtype(n_bytes: int) -> type[np.unsignedinteger]:
    """What holds every offset in files of so many bytes."""
    return np.uint32 if n_bytes <= np.iinfo(np.uint32).max else np.uint64


def _check_alike(ref: str, d_in: int, dtype: str, other_ref: str, other_d_in: int, other_dtype: str) -> None:
    if (d_in, dtype) != (other_d_in, other_dtype):
        raise StoreError(
            f"{ref} holds {dtype} vectors of width {d_in}, {other_ref} {other_dtype} vectors of width {other_d_in}: "
            f"a snapshot has one kind. Extract all segments with the same activations.dtype and hook point."
        )
