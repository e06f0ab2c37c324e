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

IDENTITY = ("seq", "pos", "token")
"""Columns of int32 beside the vectors: context, position, token id."""
DTYPES = {"float16": (np.float16, pa.float16()), "float32": (np.float32, pa.float32())}


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
    dtype: str
    row_groups: tuple[RowGroup, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector."""
        return self.d_in * np.dtype(self.dtype).itemsize


def write_part(
    path: Path, act: np.ndarray, seq: np.ndarray, pos: np.ndarray, token: np.ndarray, *, row_group_rows: int
) -> PartLayout:
    """Write one part.

    Args:
        path: a local file in a staging folder.
        act: vectors in the order they are stored. [rows, d_in] float16 or float32
        seq, pos, token: identity of every row: context, position, token id. [rows] int32
        row_group_rows: rows per row group; the last one may be shorter.

    Returns: where the rows of each row group lie, with their hashes.
    Raises: StoreError when the written file does not keep the raw-page contract.
    """
    if str(act.dtype) not in DTYPES:
        raise ValueError(f"dtype {act.dtype}: one of {sorted(DTYPES)}")
    n_rows, d_in = act.shape
    values_type = DTYPES[str(act.dtype)][1]
    vector = pa.list_(pa.field("item", values_type, nullable=False))
    schema = pa.schema(
        [
            pa.field("act", vector, nullable=False),
            *(pa.field(name, pa.int32(), nullable=False) for name in IDENTITY),
        ],
        metadata={"sae.d_in": str(d_in), "sae.dtype": str(act.dtype)},
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
            offsets = np.arange(0, block.size + 1, d_in, dtype=np.int32)
            columns = [pa.ListArray.from_arrays(offsets, pa.array(block.reshape(-1), values_type), type=vector)]
            identity = np.ascontiguousarray(np.stack([column[rows] for column in (seq, pos, token)]), np.int32)
            columns += [pa.array(column, pa.int32()) for column in identity]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=row_group_rows)
            hashes.append((xxhash.xxh3_64_hexdigest(block.data), xxhash.xxh3_64_hexdigest(identity.data)))
    return _located(path, n_rows, d_in, str(act.dtype), hashes)


def _located(path: Path, n_rows: int, d_in: int, dtype: str, hashes: list[tuple[str, str]]) -> PartLayout:
    """Find the raw values of every row group and prove that they are what was written."""
    metadata = pq.read_metadata(path)
    row_bytes = d_in * np.dtype(dtype).itemsize
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
    return PartLayout(n_rows=n_rows, d_in=d_in, dtype=dtype, row_groups=tuple(groups))
