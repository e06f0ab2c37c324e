"""The part of Thrift's compact protocol that Parquet's page headers and footers are written in.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from collections.abc import Sequence
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
LONG_LIST = 15
"""In place of a list's size, where it does not fit four bits."""
_ONE_BYTE = tuple(bytes([value]) for value in range(0x80))


Field = tuple[int, int, bytes]
"""A field of a struct, ready to be written: its number, its kind, its data."""


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, least first."""
    if value < 0x80:  # most are
        return _ONE_BYTE[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def i32(number: int, value: int) -> Field:
    """A field of a signed number."""
    return number, I32, _zigzag(value)


def i64(number: int, value: int) -> Field:
    """A field of a signed number."""
    return number, I64, _zigzag(value)


def text(number: int, value: str) -> Field:
    """A field of text."""
    return number, BINARY, _text(value)


def nested(number: int, fields: Sequence[Field]) -> Field:
    """A field that is a struct."""
    return number, STRUCT, struct(fields)


def structs(number: int, items: Sequence[Sequence[Field]]) -> Field:
    """A field that is a list of structs."""
    return number, LIST, _list(STRUCT, [struct(fields) for fields in items])


def i32s(number: int, values: Sequence[int]) -> Field:
    """A field that is a list of signed numbers."""
    return number, LIST, _list(I32, [_zigzag(value) for value in values])


def texts(number: int, values: Sequence[str]) -> Field:
    """A field that is a list of texts."""
    return number, LIST, _list(BINARY, [_text(value) for value in values])


def struct(fields: Sequence[Field]) -> bytes:
    """A struct; its fields in order of their numbers, which are fewer than 16 apart."""
    out, before = bytearray(), 0
    for number, kind, data in fields:
        out.append(number - before << 4 | kind)
        out += data
        before = number
    out.append(0)
    return bytes(out)


def read_struct(data: bytes | memoryview, start: int = 0) -> tuple[dict[int, Any], int]:
    """A struct's values by field number, and where it ends.

    Raises: ValueError, IndexError or RecursionError for bytes that are none.
    """
    fields: dict[int, Any] = {}
    number, at = 0, start
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_signed(data, at)
        fields[number], at = _read_value(data, at, head & 15)
    return fields, at + 1


def _read_value(data: bytes | memoryview, at: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind in (I16, I32, I64):
        return _read_signed(data, at)
    if kind == BINARY:
        size, at = _read_varint(data, at)
        if at + size > len(data):
            raise ValueError(f"a text of {size} bytes where {len(data) - at} are left")
        return bytes(data[at : at + size]), at + size
    if kind == STRUCT:
        return read_struct(data, at)
    if kind == LIST:
        return _read_list(data, at)
    if kind == BYTE:
        return data[at], at + 1
    raise ValueError(f"a value of Thrift type {kind}, which page headers and footers do not have")


def _read_list(data: bytes | memoryview, at: int) -> tuple[list[Any], int]:
    size, kind, at = data[at] >> 4, data[at] & 15, at + 1
    if size == LONG_LIST:
        size, at = _read_varint(data, at)
    if at + size > len(data):
        raise ValueError(f"a list of {size} items where {len(data) - at} bytes are left")
    items = []
    for _ in range(size):
        item, at = _read_value(data, at, kind)
        items.append(item)
    return items, at


def _read_signed(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return value | data[at] << shift, at + 1


def _zigzag(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _text(value: str) -> bytes:
    data = value.encode()
    return varint(len(data)) + data


def _list(kind: int, items: Sequence[bytes]) -> bytes:
    size = bytes([len(items) << 4 | kind]) if len(items) < LONG_LIST else bytes([LONG_LIST << 4 | kind])
    return size + (varint(len(items)) if len(items) >= LONG_LIST else b"") + b"".join(items)
