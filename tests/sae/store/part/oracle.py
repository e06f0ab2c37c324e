"""The same part written by pyarrow: slow, and by other hands. What our own writer is compared with."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae.store.part.encoding import Encoding
from sae.store.part.pages import key_values

IDENTITY = ("seq", "pos", "token")


def write_with_pyarrow(
    path: Path,
    act: np.ndarray,
    seq: np.ndarray,
    pos: np.ndarray,
    token: np.ndarray,
    *,
    row_group_rows: int,
    encoding: Encoding,
) -> None:
    """As write_part: every column chunk one raw page with its CRC, though not aligned."""
    kind = vector_type(act)
    schema = pa.schema(
        [
            pa.field("act", kind, nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in IDENTITY),
        ]
    )
    with pq.ParquetWriter(
        path,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        data_page_size=1 << 30,
        max_rows_per_page=1 << 30,
        store_schema=False,
    ) as writer:
        for start in range(0, len(act), row_group_rows):
            rows = slice(start, start + row_group_rows)
            columns = [vectors(act[rows], kind), *(pa.array(column[rows]) for column in (seq, pos, token))]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=row_group_rows)
        writer.add_key_value_metadata(key_values(encoding, act.shape[1]))


def vector_type(act: np.ndarray) -> pa.DataType:
    if act.dtype.kind == "f":
        return pa.list_(pa.field("element", pa.from_numpy_dtype(act.dtype), nullable=False))
    return pa.binary(act.shape[1] * act.dtype.itemsize)


def vectors(block: np.ndarray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, len(block), [None, pa.py_buffer(np.ascontiguousarray(block))])
    offsets = np.arange(0, block.size + 1, block.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(block.reshape(-1), kind.value_type), type=kind)
