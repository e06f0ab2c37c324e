"""The bytes of a part file around its raw values: page headers, levels, footer. Pure; FORMAT.md says the same in words.

A part is Parquet (https://github.com/apache/parquet-format) whose every column chunk is one PLAIN, uncompressed V1 data
page. A page is a header, for a list column the levels that say where lists begin, and the values.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sae.store.part.encoding import Encoding, stored_dtype
from sae.store.part.thrift import Field, i32, i32s, i64, nested, struct, structs, text, texts, varint

MAGIC = b"PAR1"
FORMAT = 2
"""Of part files; readers refuse a larger one. Also in `sae.format` of the footer."""
ALIGNMENT = 4096
"""Vectors begin at a multiple of it: a page of memory, a block of any disk."""
IDENTITY = ("seq", "pos", "token")
"""Columns of int32 beside the vectors: context, position, token id."""
MAX_PAGE_BYTES = (1 << 31) - 1

# Numbers of parquet.thrift.
PARQUET_VERSION = 2
INT32, FLOAT, FIXED_LEN_BYTE_ARRAY = 1, 4, 7
REQUIRED, REPEATED = 0, 2
LIST_CONVERTED = 3
LIST_LOGICAL, FLOAT16_LOGICAL = 3, 15
DATA_PAGE = 0
PLAIN, RLE = 0, 3
UNCOMPRESSED = 0

_DATA_PAGE = i32(1, DATA_PAGE)
_ENCODINGS = (i32(2, PLAIN), i32(3, RLE), i32(4, RLE))
"""Of a page's values and of its two kinds of levels."""
_NO_METADATA_ELSEWHERE = i64(2, 0)
"""A chunk's metadata stands in the footer alone."""


class Chunk(NamedTuple):
    """A column chunk, which is one page."""

    offset: int
    """Of its page header in the file."""
    n_bytes: int
    """With the header."""
    n_values: int


def is_list(dtype: str) -> bool:
    """Whether vectors are lists of numbers; there is no Parquet number of bfloat16's or int8's width, so those are
    binary rows of fixed length."""
    return dtype in ("float16", "float32")


def n_values(dtype: str, n_rows: int, d_in: int) -> int:
    """Values, in Parquet's sense, of that many vectors."""
    return n_rows * d_in if is_list(dtype) else n_rows


def list_levels(dtype: str, n_rows: int, d_in: int) -> bytes:
    """What lies between a vectors page's header and its values: where every list begins, and that none is null.

    Repetition levels (0 begins a row, 1 goes on) as one run of a zero and one of d_in - 1 ones for every row, then
    definition levels as one run of ones; each after its length in four bytes. Nothing for rows of fixed length.
    """
    if not is_list(dtype):
        return b""
    if d_in == 1:
        repetition = varint(n_rows << 1) + b"\x00"
    else:
        repetition = (b"\x02\x00" + varint(d_in - 1 << 1) + b"\x01") * n_rows
    definition = varint(n_rows * d_in << 1) + b"\x01"
    return b"".join(len(run).to_bytes(4, "little") + run for run in (repetition, definition))


def page_header(n_bytes: int, values: int, crc: int) -> bytes:
    """The header of a page.

    Args:
        n_bytes: of levels and values.
        values: how many.
        crc: CRC-32 (zlib's) of levels and values.
    """
    signed = crc - (1 << 32) if crc >> 31 else crc
    data = [i32(1, values), *_ENCODINGS]
    return struct([_DATA_PAGE, i32(2, n_bytes), i32(3, n_bytes), i32(4, signed), nested(5, data)])


def vectors_offset(end: int, levels: bytes, n_bytes: int, values: int) -> int:
    """Where the vectors of a row group lie in the file.

    The page's header ends where its levels begin, and they end where the vectors begin: at the first multiple of
    ALIGNMENT that leaves room for a header of any CRC (its length varies) behind what was written before.

    Args:
        end: of what was written before.
        n_bytes: of the vectors.
        values: as n_values.
    """
    longest = len(page_header(len(levels) + n_bytes, values, 1 << 31))
    return -(-(end + longest + len(levels)) // ALIGNMENT) * ALIGNMENT


def footer(encoding: Encoding, d_in: int, groups: Sequence[tuple[int, Sequence[Chunk]]]) -> bytes:
    """The end of a part file: the metadata, its length and the magic number.

    Args:
        groups: rows and chunks (act, seq, pos, token) of every row group.
    """
    columns = _columns(encoding.dtype)
    metadata = struct(
        [
            i32(1, PARQUET_VERSION),
            structs(2, _schema(encoding.dtype, d_in)),
            i64(3, sum(n_rows for n_rows, _ in groups)),
            structs(4, [_row_group(columns, *group) for group in groups]),
            structs(5, [[text(1, key), text(2, value)] for key, value in key_values(encoding, d_in).items()]),
            text(6, f"sae-pipeline version {FORMAT}"),
        ]
    )
    return metadata + len(metadata).to_bytes(4, "little") + MAGIC


def key_values(encoding: Encoding, d_in: int) -> dict[str, str]:
    """The footer's own words on what stored values mean: enough to decode them without the store."""
    found = {"sae.format": str(FORMAT), "sae.d_in": str(d_in), "sae.dtype": encoding.dtype}
    if encoding.dtype == "float16":
        found["sae.exponent"] = str(encoding.exponent)
    if encoding.scale is not None and encoding.offset is not None:
        found |= {"sae.scale": encoding.scale, "sae.offset": encoding.offset}
    return found


def _schema(dtype: str, d_in: int) -> list[list[Field]]:
    root = [text(4, "schema"), i32(5, 1 + len(IDENTITY))]
    identity = [[i32(1, INT32), i32(3, REQUIRED), text(4, name)] for name in IDENTITY]
    if not is_list(dtype):
        row_bytes = d_in * stored_dtype(dtype).itemsize
        act = [i32(1, FIXED_LEN_BYTE_ARRAY), i32(2, row_bytes), i32(3, REQUIRED), text(4, "act")]
        return [root, act, *identity]
    element = [i32(1, FLOAT), i32(3, REQUIRED), text(4, "element")]
    if dtype == "float16":
        kind = [nested(FLOAT16_LOGICAL, [])]
        element = [i32(1, FIXED_LEN_BYTE_ARRAY), i32(2, 2), i32(3, REQUIRED), text(4, "element"), nested(10, kind)]
    act = [i32(3, REQUIRED), text(4, "act"), i32(5, 1), i32(6, LIST_CONVERTED), nested(10, [nested(LIST_LOGICAL, [])])]
    repeated = [i32(3, REPEATED), text(4, "list"), i32(5, 1)]
    return [root, act, repeated, element, *identity]


def _columns(dtype: str) -> list[list[Field]]:
    """What the metadata of every column's chunks begins with: type, encodings, path, codec."""
    kinds = [FLOAT if dtype == "float32" else FIXED_LEN_BYTE_ARRAY] + [INT32] * len(IDENTITY)
    paths = [["act", "list", "element"] if is_list(dtype) else ["act"], *([name] for name in IDENTITY)]
    return [
        [i32(1, kind), i32s(2, [PLAIN, RLE]), texts(3, path), i32(4, UNCOMPRESSED)]
        for kind, path in zip(kinds, paths, strict=True)
    ]


def _row_group(columns: Sequence[Sequence[Field]], n_rows: int, chunks: Sequence[Chunk]) -> list[Field]:
    n_bytes = sum(chunk.n_bytes for chunk in chunks)
    chunk_fields = [_chunk(column, chunk) for column, chunk in zip(columns, chunks, strict=True)]
    offset = chunks[0].offset
    return [structs(1, chunk_fields), i64(2, n_bytes), i64(3, n_rows), i64(5, offset), i64(6, n_bytes)]


def _chunk(column: Sequence[Field], chunk: Chunk) -> list[Field]:
    sizes = [i64(5, chunk.n_values), i64(6, chunk.n_bytes), i64(7, chunk.n_bytes), i64(9, chunk.offset)]
    return [_NO_METADATA_ELSEWHERE, nested(3, [*column, *sizes])]
