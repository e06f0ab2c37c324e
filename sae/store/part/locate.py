"""Where the raw values of a part file lie, found in the file itself: for a file whose record is not at hand.

A reader of the store trusts bytes that have their recorded hash. Here there is none, so everything that FORMAT.md says
of a part file is looked at, page headers, levels and checksums included, before an offset is given out.
"""

import operator
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import ValidationError
from zlib_ng.zlib_ng import crc32

from sae.errors import StoreError
from sae.store.part import pages
from sae.store.part.encoding import Encoding, stored_dtype
from sae.store.part.thrift import read_struct
from sae.store.part.writer import PartLayout, RowGroup

COLUMNS = ("act", *pages.IDENTITY)
HEADER_BYTES = 256
"""More than any page header of ours takes."""
TAIL_BYTES = 8
"""After the footer: its length, and PAR1."""
ENCODINGS, CODEC, COMPRESSED_SIZE, DATA_PAGE, DICTIONARY_PAGE = 2, 4, 7, 9, 11
"""Fields of a column's metadata in a footer."""
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
PLAIN, RLE = 0, 3
UNDECODABLE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)
"""What pyarrow raises for a file that is damaged. Storage's own errors are none of these and pass through it."""
UNREADABLE = (ValueError, LookupError, TypeError, RecursionError)
"""What our own reader raises for a header or a footer that is damaged."""


def read_layout(path: Path) -> PartLayout:
    """The layout of a part file, as `write_part` returned it. Reads all of the file, a row group at a time.

    Raises: StoreError when it is of a newer format, damaged, or not one raw page for every column and row group; the
        message says which and where.
    """
    try:
        metadata = pq.read_metadata(path)
    except UNDECODABLE as err:
        raise StoreError(f"{path}: no readable Parquet file ({err}). Fetch or extract it again.") from err
    encoding, d_in = _encoding(path, metadata)
    schema = metadata.schema.to_arrow_schema().remove_metadata()
    if schema != _schema(encoding.dtype, d_in):
        _refuse(path, f"its columns are {', '.join(f'{field.name}: {field.type}' for field in schema)}")
    with open(path, "rb") as file:
        groups = tuple(
            _row_group(path, file, n_rows, columns, index, encoding.dtype, d_in)
            for index, (n_rows, columns) in enumerate(_row_groups(path, file))
        )
    return PartLayout(n_rows=metadata.num_rows, d_in=d_in, encoding=encoding, row_groups=groups)


def _refuse(path: Path, why: str) -> NoReturn:
    raise StoreError(f"{path}: not a raw part ({why}). Another tool has written it; see FORMAT.md.")


def _encoding(path: Path, metadata: pq.FileMetaData) -> tuple[Encoding, int]:
    """What the footer's key-value metadata say of stored values, and d_in."""
    words = (metadata.metadata or {}).items()
    said = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in words}
    try:
        found, d_in = int(said["sae.format"]), int(said["sae.d_in"])
    except (KeyError, ValueError) as err:
        _refuse(path, f"its footer does not say what it holds: {err}")
    if found > pages.FORMAT:
        raise StoreError(
            f"{path}: a part of format {found}, this version reads up to {pages.FORMAT}. Use a newer sae-pipeline."
        )
    fields = {name: said[f"sae.{name}"] for name in Encoding.model_fields if f"sae.{name}" in said}
    try:
        return Encoding.model_validate(fields), d_in
    except ValidationError as err:
        _refuse(path, f"its footer says {fields}: {err.errors()[0]['msg']}")


def _schema(dtype: str, d_in: int) -> pa.Schema:
    """The columns of a part, as pyarrow sees them."""
    act = pa.binary(d_in * stored_dtype(dtype).itemsize)
    if pages.is_list(dtype):
        values = pa.float16() if dtype == "float16" else pa.float32()
        act = pa.list_(pa.field("element", values, nullable=False))
    kinds = [act] + [pa.int32()] * len(pages.IDENTITY)
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in zip(COLUMNS, kinds, strict=True)])


class _Chunk(NamedTuple):
    """What a footer says of a column of a row group."""

    codec: int
    encodings: tuple[int, ...]
    has_dictionary: bool
    offset: int
    size: int

    @classmethod
    def of(cls, metadata: dict[int, Any]) -> "_Chunk":
        """Raises: KeyError or TypeError where something is missing or no number."""
        codec, offset, size = (operator.index(metadata[field]) for field in (CODEC, DATA_PAGE, COMPRESSED_SIZE))
        encodings = tuple(map(operator.index, metadata[ENCODINGS]))
        return cls(codec, encodings, DICTIONARY_PAGE in metadata, offset, size)


def _row_groups(path: Path, file: BinaryIO) -> list[tuple[int, list[_Chunk]]]:
    """Of every row group in the footer, its rows and its columns.

    By our own reader: pyarrow ends the process where a damaged footer names a codec that it does not know.
    """
    file.seek(-TAIL_BYTES, os.SEEK_END)
    n_bytes = int.from_bytes(file.read(4), "little")
    file.seek(-TAIL_BYTES - n_bytes, os.SEEK_END)
    try:
        footer, _ = read_struct(file.read(n_bytes))
        return [(operator.index(group[3]), [_Chunk.of(chunk[3]) for chunk in group[1]]) for group in footer[4]]
    except UNREADABLE as err:
        raise StoreError(f"{path}: no readable footer ({err!r}): the file is damaged. Fetch it again.") from err


def _row_group(
    path: Path, file: BinaryIO, n_rows: int, columns: list[_Chunk], index: int, dtype: str, d_in: int
) -> RowGroup:
    most = path.stat().st_size
    if not 0 < n_rows * d_in * stored_dtype(dtype).itemsize <= most:
        _refuse(path, f"row group {index}: {n_rows} rows of {d_in} values in a file of {most} bytes")
    levels = [pages.list_levels(dtype, n_rows, d_in)] + [b""] * len(pages.IDENTITY)
    n_values = [pages.n_values(dtype, n_rows, d_in)] + [n_rows] * len(pages.IDENTITY)
    sizes = [n_rows * d_in * stored_dtype(dtype).itemsize] + [n_rows * 4] * len(pages.IDENTITY)
    offsets, values = [], []
    if len(columns) != len(COLUMNS):
        _refuse(path, f"row group {index}: {len(columns)} columns")
    for column, (name, chunk) in enumerate(zip(COLUMNS, columns, strict=True)):
        where = f"row group {index}, column {name}"
        if chunk.codec != 0 or chunk.has_dictionary or not {*chunk.encodings} <= {PLAIN, RLE}:
            codec = CODECS[chunk.codec] if chunk.codec in range(len(CODECS)) else chunk.codec
            _refuse(path, f"{where}: codec {codec}, encodings {', '.join(map(str, chunk.encodings))}")
        expected = levels[column]
        n_bytes = len(expected) + sizes[column]
        offset, size = chunk.offset, chunk.size
        if not 0 <= offset <= most or not n_bytes < size <= n_bytes + HEADER_BYTES:
            _refuse(path, f"{where}: not one plain page of {n_bytes} bytes, but {size} bytes at offset {offset}")
        file.seek(offset)
        data = memoryview(file.read(size))
        start = _check_header(path, where, data, n_bytes, n_values[column])
        if data[start : start + len(expected)] != expected:
            _refuse(path, f"{where}: its lists are not all {d_in} long")
        offsets.append(offset + start + len(expected))
        values.append(data[start + len(expected) :])
    if offsets[0] % pages.ALIGNMENT:
        _refuse(path, f"row group {index}: its vectors begin at {offsets[0]}, no multiple of {pages.ALIGNMENT}")
    identity = xxhash.xxh3_64()
    for column_values in values[1:]:
        identity.update(column_values)
    return RowGroup(
        offset=offsets[0],
        n_rows=n_rows,
        xxh3=xxhash.xxh3_64_hexdigest(values[0]),
        identity=(offsets[1], offsets[2], offsets[3]),
        identity_xxh3=identity.hexdigest(),
    )


def _check_header(path: Path, where: str, data: memoryview, n_bytes: int, n_values: int) -> int:
    """Compare a page's header with the page. Returns: the length of the header."""
    try:
        header, start = read_struct(data[:HEADER_BYTES])
    except UNREADABLE as err:
        raise StoreError(f"{path}: {where}: no page header ({err}): the file is damaged. Fetch it again.") from err
    crc = header.pop(4, None)
    expected, _ = read_struct(pages.page_header(n_bytes, n_values, 0))
    del expected[4]
    if isinstance(data_header := header.get(5), dict):
        data_header.pop(5, None)  # statistics, which mean nothing here
    if header != expected or len(data) != start + n_bytes:
        _refuse(path, f"{where}: not one plain page of {n_values} values in {n_bytes} bytes")
    if crc is not None and crc & 0xFFFFFFFF != crc32(data[start:]):
        raise StoreError(f"{path}: {where}: the page does not have its CRC: the file is damaged. Fetch it again.")
    return start
