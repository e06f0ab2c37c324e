"""How activations become stored values and back: float16, float32, bfloat16, or int8 with an affine per dimension.

An encoding belongs to one part: it is chosen from the part's own values and recorded with the part. What it costs, as
the fraction of variance lost on activations with outlier dimensions: float16 1e-7, bfloat16 5e-6, int8 6e-5.
"""

import base64
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from sae.config import FrozenConfig
from sae.errors import InputError

Dtype = Literal["float16", "float32", "bfloat16", "int8"]

STORED: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),  # its bits: numpy has no bfloat16
    "int8": np.dtype("i1"),
}
FLOAT16_CEILING = 32752.0
"""Half of float16's largest value: larger values are stored divided by a power of two."""
MAX_EXPONENT = 15
"""The least step of float16 is then 2^-9: beside larger outliers ordinary activations would be lost."""
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
LARGEST = {
    "float16": FLOAT16_CEILING * 2**MAX_EXPONENT,
    "float32": FLOAT32_MAX,
    "bfloat16": float(torch.finfo(torch.bfloat16).max),
    "int8": FLOAT32_MAX,
}
"""Magnitudes that a part can hold."""
INT8_STEPS = 255
BLOCK_ROWS = 1024
"""Rows converted at once, so that what is float32 on the way stays small and near the processor."""
CACHED_PARTS = 1024
"""Parts whose affine a Decoder keeps: many more than the order of rows has in the pool at a time."""


class Encoding(FrozenConfig):
    """What the stored values of one part mean."""

    dtype: Dtype
    exponent: int = Field(0, ge=0, le=MAX_EXPONENT)
    """float16: value = stored * 2**exponent."""
    scale: str | None = None
    """int8: value = stored * scale + offset, per dimension. Base64 of little-endian float32 [d_in]."""
    offset: str | None = None
    """int8, as scale."""

    @model_validator(mode="after")
    def _fields_of_its_dtype(self) -> Self:
        if self.exponent and self.dtype != "float16":
            raise ValueError(f"exponent {self.exponent}, which only float16 has, not {self.dtype}")
        if ((self.scale is None) + (self.offset is None)) != (0 if self.dtype == "int8" else 2):
            raise ValueError(f"{self.dtype}: int8 has scale and offset, the others have neither")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether a stored value is the value, in its own precision, for numpy too."""
        return self.dtype == "float32" or (self.dtype == "float16" and self.exponent == 0)


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of stored values: float16, float32, uint16 (the bits of bfloat16) or int8."""
    return STORED[dtype]


def choose_encoding(dtype: Dtype, low: Tensor, high: Tensor) -> Encoding:
    """The encoding of a part whose values lie between these bounds.

    Args:
        low, high: least and greatest value of every dimension, over all rows of the part; NaN where any is. [d_in],
            or scalars for all dimensions, which is enough unless the dtype is int8.

    Raises: InputError for values that are not finite, and for values too large for the dtype.
    """
    low, high = (bound.detach().double().cpu().reshape(-1) for bound in (low, high))
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    if bad.any():
        where = f"dimension {int(bad.nonzero()[0])}: " if len(bad) > 1 else ""
        raise InputError(f"{where}activations that are NaN or infinite")
    largest = float(torch.maximum(-low, high).max())
    if largest > LARGEST[dtype]:
        raise InputError(
            f"an activation of {largest:.6g} is too large for {dtype}, which goes up to {LARGEST[dtype]:.6g}"
        )
    if dtype == "float16":
        return Encoding(dtype=dtype, exponent=_exponent(largest))
    if dtype != "int8":
        return Encoding(dtype=dtype)
    scale = ((high - low) / INT8_STEPS).float()
    scale[scale < torch.finfo(torch.float32).tiny] = 0.0  # constant: the offset says all
    offset = (low + 128 * scale.double()).float()
    return Encoding(dtype=dtype, scale=_to_text(scale), offset=_to_text(offset))


def encode_as(values: Tensor, encoding: Encoding) -> np.ndarray:
    """Values as they are stored. [rows, d_in] of `stored_dtype`

    Args:
        values: any float dtype, on any device, within the bounds that the encoding was chosen from. [rows, d_in]
    """
    dtype = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    out = torch.empty(values.shape, dtype=dtype[encoding.dtype], device=values.device)
    scale, offset = _affine(encoding, values.device)
    if scale is None:
        out.copy_(values)
    else:
        divisor = scale.where(scale > 0, 1.0)  # a constant dimension: value - offset is 0
        for start in range(0, len(values), BLOCK_ROWS):
            block = values[start : start + BLOCK_ROWS].float()
            block = (block if offset is None else block - offset) / divisor
            if encoding.dtype == "int8":
                block.round_().clamp_(-128, 127)
            out[start : start + BLOCK_ROWS] = block
    if encoding.dtype == "bfloat16":
        out = out.view(torch.uint16)
    return out.cpu().numpy()


def encode(values: Tensor, dtype: Dtype) -> tuple[np.ndarray, Encoding]:
    """The stored values of a whole part, and what they mean.

    Args:
        values: any float dtype, on any device. [rows, d_in]

    Returns: [rows, d_in] of `stored_dtype`, and the encoding.
    Raises: InputError as choose_encoding; the caller knows where the values come from.
    """
    if len(values) == 0:
        return np.empty(values.shape, stored_dtype(dtype)), choose_encoding(dtype, *[torch.zeros(values.shape[1])] * 2)
    # Many times as fast as aminmax over rows.
    bounds = (values.amin(0), values.amax(0)) if dtype == "int8" else torch.aminmax(values)
    encoding = choose_encoding(dtype, *bounds)
    return encode_as(values, encoding), encoding


def decode(raw: Tensor, encoding: Encoding, out: Tensor | None = None) -> Tensor:
    """Stored values as float32, on the device they are on: the same bits on every device.

    Args:
        raw: of `stored_dtype`. [rows, d_in]
        out: filled and returned, if given. [rows, d_in] float32
    """
    return _apply(raw, *_affine(encoding, raw.device), out=out)


class Decoder:
    """Decodes rows of several parts of one dtype on a device. What a part's affine needs there is kept for a while."""

    def __init__(self, encodings: Sequence[Encoding], d_in: int, device: str | torch.device) -> None:
        self._encodings, self._d_in, self._device = encodings, d_in, torch.device(device)
        self._kept: OrderedDict[int, tuple[Tensor | None, Tensor | None]] = OrderedDict()
        first = encodings[0]
        self.is_same = first.dtype in ("float32", "bfloat16") or all(encoding == first for encoding in encodings)
        """Whether all parts have one encoding, so that nobody needs to say which part a row is of."""
        self.is_plain = self.is_same and first.scale is None and first.exponent == 0
        """Whether stored values are the values of all rows, in their own precision."""

    def __call__(self, raw: Tensor, part: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Stored values as float32 on the device. [rows, d_in]

        Args:
            raw: of `stored_dtype` or as `as_values` has them, on any device: moved as they are stored. [rows, d_in]
            part: of every row, an index into the encodings, on the CPU; not needed where `is_same`. [rows] integers
            out: on the device; filled and returned, if given. [rows, d_in] float32

        Raises: ValueError when the parts differ and `part` is not given.
        """
        raw = raw.to(self._device, non_blocking=True)
        if self.is_same:
            return _apply(raw, *self._constants(0), out=out)
        if part is None:
            raise ValueError("the parts have different encodings: say which part every row is of")
        present, row = torch.unique(part.cpu(), return_inverse=True)
        scales, offsets = zip(*[self._constants(index) for index in present.tolist()], strict=True)
        row = row.to(self._device)
        return _apply(raw, _rows_of(scales, row), _rows_of(offsets, row), out=out)

    def _constants(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and offset of a part, on the device."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        self._kept[index] = _affine(self._encodings[index], self._device)
        if len(self._kept) > CACHED_PARTS:
            self._kept.popitem(last=False)
        return self._kept[index]


def as_values(raw: Tensor) -> Tensor:
    """Stored values as numbers of their own precision: uint16 are the bits of bfloat16. Shares the memory."""
    return raw.view(torch.bfloat16) if raw.dtype == torch.uint16 else raw


def _apply(raw: Tensor, scale: Tensor | None, offset: Tensor | None, out: Tensor | None = None) -> Tensor:
    """raw * scale + offset. Two roundings, on every device: one fused operation would give other bits."""
    values = as_values(raw)
    out = values.to(torch.float32, copy=True) if out is None else out.copy_(values)
    if scale is not None:
        out.mul_(scale)
    if offset is not None:
        out.add_(offset)
    return out


def _affine(encoding: Encoding, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Scale [d_in] or [1], and offset [d_in]; None where a stored value is the value."""
    if encoding.scale is not None and encoding.offset is not None:
        return _from_text(encoding.scale).to(device), _from_text(encoding.offset).to(device)
    return (torch.tensor([2.0**encoding.exponent], device=device) if encoding.exponent else None), None


def _rows_of(vectors: Sequence[Tensor | None], row: Tensor) -> Tensor | None:
    """The vector of every row. [rows, d_in] or [rows, 1]; None where no part has one."""
    some = [vector for vector in vectors if vector is not None]
    if not some:
        return None
    one = torch.ones(1, device=row.device)  # a part of float16 without exponent, beside others
    return torch.stack([one if vector is None else vector for vector in vectors])[row]


def _exponent(largest: float) -> int:
    """The least power of two by which `largest` must be divided to be no larger than the ceiling."""
    exponent = 0
    while largest > FLOAT16_CEILING * 2.0**exponent:
        exponent += 1
    return exponent


def _to_text(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
