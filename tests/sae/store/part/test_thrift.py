"""The compact protocol, against bytes worked by hand from its specification."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.store.part.thrift import i32, i32s, i64, nested, read_struct, struct, structs, text, texts, varint


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], "00"),
        ([i32(1, 0)], "15 00 00"),
        ([i32(1, 1), i32(2, -1), i64(4, 64)], "15 02 15 01 26 80 01 00"),
        ([i32(4, -(1 << 31))], "45 ff ff ff ff 0f 00"),
        ([text(4, "act")], "48 03 61 63 74 00"),
        ([nested(10, [nested(15, [])])], "ac fc 00 00 00"),
        ([i32s(2, [0, 3])], "29 25 00 06 00"),
        ([texts(3, ["a", ""])], "39 28 01 61 00 00"),
        ([structs(1, [[i32(1, 1)]] * 15)], "19 fc 0f" + " 15 02 00" * 15 + " 00"),
    ],
)
def test_structs_are_the_specified_bytes(fields: list, expected: str) -> None:
    assert struct(fields) == bytes.fromhex(expected)


def test_a_varint_is_seven_bits_a_byte() -> None:
    assert [varint(n) for n in (0, 127, 128, 300)] == [b"\x00", b"\x7f", b"\x80\x01", b"\xac\x02"]


@given(a=st.integers(-(2**31), 2**31 - 1), b=st.integers(-(2**63), 2**63 - 1), words=st.text())
def test_what_is_written_is_read(a: int, b: int, words: str) -> None:
    data = struct([i32(1, a), nested(5, [i64(1, b), i32(9, a)]), text(6, words)])
    assert read_struct(b"xy" + data + b"z", 2) == ({1: a, 5: {1: b, 9: a}, 6: words.encode()}, 2 + len(data))


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_struct_are_refused(data: bytes) -> None:
    try:
        _, end = read_struct(data)
    except (ValueError, IndexError):
        return
    assert 0 < end <= len(data)
    assert data[end - 1] == 0
