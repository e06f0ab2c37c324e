import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from sae.report import chunks


def test_a_chunk_is_one_call_with_a_key_and_base64(tmp_path: Path) -> None:
    chunks.write_chunk(tmp_path, "data/a/col/max", b"</script>" * 50)
    script = (tmp_path / "data/a/col/max.js").read_text()
    found = re.fullmatch(r'SAE\.put\("data/a/col/max","([A-Za-z0-9+/=]+)"\);\n', script)
    assert found
    assert zlib.decompress(base64.b64decode(found[1]), -15) == b"</script>" * 50


@pytest.mark.parametrize("key", ['a"', "A", "../a", "a/../b", "", "a b", "a\n"])
def test_keys_that_could_leave_their_place_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="chunk key"):
        chunks.write_chunk(tmp_path, key, b"")


def test_rounding_keeps_twelve_bits_and_what_is_not_finite() -> None:
    values = np.concatenate([np.random.default_rng(0).lognormal(0, 9, 5000), [0, np.nan, np.inf, -np.inf, -1.5]])
    values = values.astype(np.float32)
    rounded = chunks.round_mantissa(values)
    finite = np.isfinite(values)
    assert np.all(np.abs(rounded[finite] - values[finite]) <= np.abs(values[finite]) * 2.0**-13 * 1.001)
    np.testing.assert_array_equal(rounded[~finite], values[~finite])
    assert np.all(rounded[finite].view(np.uint32) & 0x7FF == 0)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        chunks.encode_column(np.array([3, -1]))


def test_nan_is_not_written_as_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        chunks.encode_json({"x": float("nan")})
    assert json.loads(chunks.encode_json({"x": "é"})) == {"x": "é"}


@pytest.mark.parametrize(("n_bytes", "expected"), [(640_000, 16), (64_000, 256), (100_000_000, 1)])
def test_chunks_hold_a_power_of_two_of_latents_near_the_target(n_bytes: int, expected: int) -> None:
    assert chunks.latents_per_chunk(n_bytes, 64, 256 << 10) == expected


COLUMNS = {
    "counts": np.array([0, 1, 2**32 - 1, 70_000], np.int64),
    "large": np.array([2**40, 1], np.int64),
    "flags": np.array([True, False, True]),
    "sparks": np.arange(48, dtype=np.uint8).reshape(3, 16),
    "floats": np.array([0.0, -1.5, np.nan, 3.14159, 1e-30, np.inf]),
    "none": np.zeros(0),
}


@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
def test_columns_come_back_and_are_encoded_alike_again(values: np.ndarray) -> None:
    payload = chunks.encode_column(values)
    found = chunks.decode_column(payload)
    expected = values if values.dtype.kind != "f" else chunks.round_mantissa(values.astype(np.float32))
    np.testing.assert_array_equal(found, expected)
    assert chunks.encode_column(found) == payload


def test_a_file_comes_back_as_it_was_given(tmp_path: Path) -> None:
    payload = np.random.default_rng(0).bytes(5000) + b"</script>" * 50
    chunks.write_chunk(tmp_path, "data/a/try", payload)
    script = (tmp_path / "data/a/try.js").read_bytes()
    assert chunks.decode_chunk("data/a/try", script) == payload
    for key, damaged in (
        ("data/a/other", script),
        ("data/a/try", script[:-40]),
        ("data/a/try", script[:60] + script[100:]),
        ("data/a/try", b""),
    ):
        with pytest.raises(ValueError, match=key):
            chunks.decode_chunk(key, damaged)


@pytest.mark.parametrize("payload", [b"", b"u4", b"x9\0\0" + bytes(8), chunks.encode_column(np.arange(9))[:-1]])
def test_what_is_no_column_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="no column"):
        chunks.decode_column(payload)
