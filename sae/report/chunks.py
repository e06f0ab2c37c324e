"""The page's data files: classic scripts that hold compressed, encoded payloads and nothing else.

A chunk is `SAE.put("<key>","<base64>")`. The payload is raw deflate. Base64 cannot end a script, so no token of the
corpus ever stands in code. fetch and ES modules fail on file://, classic scripts work everywhere.

A column is a 12-byte header (dtype, number of rows, values per row; little-endian) and the values' bytes, transposed:
all lowest bytes first, which deflates to about half.
"""

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 2
"""Of the chunks and of the page's summary. The page shows data of another version as such."""
MANTISSA_BITS = 12
"""Kept of float32 columns: a relative error of at most 1.3e-4. The latent page has exact values."""
LABEL_SHARD = 16_384
"""Latents per label shard: parsing 100,000 at once would block the page for 60 ms."""

_DTYPES = {"u1": np.uint8, "u4": np.uint32, "f4": np.float32, "f8": np.float64}
_HEADER = struct.Struct("<4sII")
_KEY = re.compile(r"[a-z0-9][a-z0-9_./-]*")
_SCRIPT = re.compile(rb'SAE\.put\("([^"]+)","([A-Za-z0-9+/]*={0,2})"\);\n')


def write_chunk(folder: Path, key: str, payload: bytes) -> int:
    """Write `payload` as `folder/<key>.js`. Returns: bytes of the file.

    Raises: ValueError for a key that is not plain lower-case ASCII: keys stand in code.
    """
    if not _KEY.fullmatch(key) or ".." in key:
        raise ValueError(f"chunk key {key!r}: only a-z 0-9 _ - . and / are allowed")
    script = f'SAE.put("{key}","{encode_payload(payload)}");\n'
    path = folder / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(script.encode())


def decode_chunk(key: str, script: bytes) -> bytes:
    """The payload of a file that `write_chunk` wrote. Raises: ValueError when it is none, or not the one of `key`."""
    match = _SCRIPT.fullmatch(script)
    if match is None or match[1].decode() != key:
        raise ValueError(f"it does not hold {key}")
    try:
        return zlib.decompress(base64.b64decode(match[2]), -zlib.MAX_WBITS)
    except (zlib.error, ValueError) as err:
        raise ValueError(f"the content of {key} cannot be unpacked") from err


def encode_payload(payload: bytes) -> str:
    """A payload as it stands in a script: deflated, in base64."""
    return base64.b64encode(deflate(payload)).decode()


def deflate(payload: bytes) -> bytes:
    """Raw deflate, level 6: level 9 takes twice as long for 2 % fewer bytes."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(payload) + compressor.flush()


def encode_json(value: Any) -> bytes:
    """Compact JSON. Raises: ValueError for NaN, which JavaScript could not read: write None."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def encode_column(values: np.ndarray) -> bytes:
    """The payload of a column.

    Args:
        values: [rows] or [rows, width]. Booleans and uint8 become u1, other integers u4 (f8 above 2^32 - 1), floats
            f4 rounded to MANTISSA_BITS. NaN stays NaN: not computed.
    """
    rows = values.shape[0]
    width = values.shape[1] if values.ndim == 2 else 1
    code = _column_dtype(values)
    stored = np.ascontiguousarray(values, dtype=np.dtype(_DTYPES[code]).newbyteorder("<"))
    if code == "f4":
        stored = round_mantissa(stored)
    size = stored.dtype.itemsize
    transposed = stored.reshape(-1).view(np.uint8).reshape(-1, size).T
    return _HEADER.pack(code.encode(), rows, width) + transposed.tobytes()


def decode_column(payload: bytes) -> np.ndarray:
    """The values of a column: [rows], or [rows, width] where they have a width. Raises: ValueError for another payload.

    Counts come back as integers, so that `encode_column` gives the same payload again.
    """
    try:
        code, rows, width = _HEADER.unpack_from(payload)
        stored = np.dtype(_DTYPES[code.rstrip(b"\0").decode()]).newbyteorder("<")
        planes = np.frombuffer(payload, np.uint8, offset=_HEADER.size).reshape(stored.itemsize, rows * width)
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as err:
        raise ValueError("this is no column") from err
    values = np.ascontiguousarray(planes.T).reshape(-1).view(stored)
    values = values.astype(np.int64 if stored.str == "<f8" else stored.newbyteorder("="))
    return values if width == 1 else values.reshape(rows, width)


def round_mantissa(values: np.ndarray, bits: int = MANTISSA_BITS) -> np.ndarray:
    """Round float32 values to `bits` bits of mantissa, to nearest; NaN and infinities stay.

    The last bits of a statistic are noise to a reader and do not compress.
    """
    drop = 23 - bits
    raw = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = ((raw + np.uint32((1 << (drop - 1)) - 1)) >> np.uint32(drop)) << np.uint32(drop)
    return np.where(np.isfinite(values), rounded, raw).astype("<u4").view("<f4")


def latents_per_chunk(n_bytes: int, n_latents: int, target_bytes: int) -> int:
    """How many latents share a file: the power of two whose files come closest to the target from below.

    Args:
        n_bytes: size of a file measured with `n_latents` latents.
    """
    per_latent = max(1.0, n_bytes / max(1, n_latents))
    return 1 << max(0, int(np.log2(max(1.0, target_bytes / per_latent))))


def _column_dtype(values: np.ndarray) -> str:
    if values.dtype in (np.bool_, np.uint8):
        return "u1"
    if values.dtype.kind in "iu":
        if values.size and values.min() < 0:
            raise ValueError(f"a column of counts holds {values.min()}: counts are not negative")
        return "f8" if values.size and values.max() > 0xFFFF_FFFF else "u4"
    return "f4"
