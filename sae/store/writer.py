"""Activation parts: rows of vectors as an ordinary Parquet file whose vectors can be read without decoding.

The contract is FORMAT.md: per row group, column `act` is one uncompressed PLAIN page of a required list of required
floats of fixed length, so the vectors are the last `rows * row_bytes` bytes of its column chunk. The columns that say
which token a row belongs to are raw pages too. Written through pyarrow.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sae.config import FrozenConfig
from sae.errors import StoreError
from sae.store.encoding import Encoding, stored_dtype

IDENTITY = ("seq", "pos", "token")
"""Columns of int32 beside the vectors: context, position, token id."""


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
    act: np.ndarray,
    seq: np.ndarray,
    pos: np.ndarray,
    token: np.ndarray,
    *,
    row_group_rows: int,
    encoding: Encoding,
) -> PartLayout:
    """Write one part.

    Args:
        path: a local file in a staging folder.
        act: stored values, in the order they are stored. [rows, d_in] of `stored_dtype`
        seq, pos, token: identity of every row: context, position, token id. [rows] int32
        row_group_rows: rows per row group; the last one may be shorter.
        encoding: what the stored values mean.

    Returns: where the rows of each row group lie, with their hashes.
    Raises: StoreError when the written file does not keep the raw-page contract.
    """
    if act.dtype != stored_dtype(encoding.dtype):
        raise ValueError(f"values of {act.dtype}, but {encoding.dtype} is stored as {stored_dtype(encoding.dtype)}")
    n_rows, d_in = act.shape
    schema = pa.schema(
        [
            pa.field("act", _vector_type(encoding.dtype, d_in), nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in IDENTITY),
        ],
        metadata={f"sae.{key}": str(value) for key, value in ({"d_in": d_in} | encoding.model_dump()).items()},
    )
    hashes = []
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
        for start in range(0, n_rows, row_group_rows):
            rows = slice(start, min(start + row_group_rows, n_rows))
            block = np.ascontiguousarray(act[rows])
            columns = [_vectors(block, schema.field("act").type)]
            identity = np.ascontiguousarray(np.stack([column[rows] for column in (seq, pos, token)]), np.int32)
            columns += [pa.array(column, pa.int32()) for column in identity]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=row_group_rows)
            hashes.append((xxhash.xxh3_64_hexdigest(block.data), xxhash.xxh3_64_hexdigest(identity.data)))
    return _located(path, n_rows, d_in, encoding, hashes)


def _vector_type(dtype: str, d_in: int) -> pa.DataType:
    """Parquet has no type of bfloat16's or int8's width: their rows are binary of fixed length."""
    if dtype in ("bfloat16", "int8"):
        return pa.binary(d_in * stored_dtype(dtype).itemsize)
    values = pa.float16() if dtype == "float16" else pa.float32()
    return pa.list_(pa.field("item", values, nullable=False))


def _vectors(block: np.ndarray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, len(block), [None, pa.py_buffer(block)])
    offsets = np.arange(0, block.size + 1, block.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(block.reshape(-1), kind.value_type), type=kind)


def _located(path: Path, n_rows: int, d_in: int, encoding: Encoding, hashes: list[tuple[str, str]]) -> PartLayout:
    """Find the raw values of every row group and prove that they are what was written."""
    metadata = pq.read_metadata(path)
    row_bytes = d_in * stored_dtype(encoding.dtype).itemsize
    groups = []
    with open(path, "rb") as file:
        for index, expected in enumerate(hashes):
            group = metadata.row_group(index)
            sizes = [group.num_rows * row_bytes] + [group.num_rows * 4] * len(IDENTITY)
            chunks = [group.column(i) for i in range(len(sizes))]
            offsets = [
                chunk.data_page_offset + chunk.total_compressed_size - size
                for chunk, size in zip(chunks, sizes, strict=True)
            ]
            found = []
            for columns in (slice(0, 1), slice(1, None)):
                hasher = xxhash.xxh3_64()
                for offset, size in zip(offsets[columns], sizes[columns], strict=True):
                    file.seek(offset)
                    hasher.update(file.read(size))
                found.append(hasher.hexdigest())
            if tuple(found) != expected:
                raise StoreError(
                    f"{path}: row group {index} is not one raw page per column (encodings {chunks[0].encodings}, "
                    f"codec {chunks[0].compression}). The pyarrow in use writes another layout; see FORMAT.md."
                )
            act, *identity = offsets
            groups.append(
                RowGroup(
                    offset=act,
                    n_rows=group.num_rows,
                    xxh3=expected[0],
                    identity=tuple(identity),
                    identity_xxh3=expected[1],
                )
            )
    return PartLayout(n_rows=n_rows, d_in=d_in, encoding=encoding, row_groups=tuple(groups))
