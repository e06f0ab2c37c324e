"""Tables of parts on disk, as Parquet: written block by block, the same bytes however the parts come."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.store.part.encoding import Dtype
from sae.store.snapshots.part_table import PartTable, check_alike, joined, offset_dtype

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
            check_alike(table.refs[0], table.d_in, table.dtype, first.refs[0], first.d_in, first.dtype)
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
        offsets = np.empty((len(_OFFSETS), n_most), offset_dtype(int(numbers["n_bytes"].max(initial=0))))
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
