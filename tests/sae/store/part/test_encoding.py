"""Encodings: what each costs, that stored values mean the same everywhere, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.errors import InputError
from sae.store.part.encoding import Decoder, Dtype, Encoding, choose_encoding, decode, encode, encode_as, stored_dtype

DTYPES: tuple[Dtype, ...] = ("float16", "float32", "bfloat16", "int8")


def residual_stream(n_rows: int = 20_000, d_in: int = 256) -> Tensor:
    """What a residual stream looks like: an offset, scales over two decades, three dimensions far out. float32"""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, d_in)
    offset = torch.randn(d_in, generator=generator) * scales
    x = torch.randn(n_rows, d_in, generator=generator) * scales + offset
    x[:, :3] *= 1000
    return x


def fvu(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def read_back(x: Tensor, dtype: Dtype) -> Tensor:
    stored, encoding = encode(x, dtype)
    return decode(torch.from_numpy(stored), encoding)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 0.0), ("float16", 1e-7), ("bfloat16", 5e-6), ("int8", 6e-5)]
)
def test_each_dtype_costs_the_variance_that_is_said_of_it(dtype: Dtype, expected: float) -> None:
    x = residual_stream()
    assert expected / 5 <= fvu(x, read_back(x, dtype)) <= expected * 2


def test_int8_serves_small_dimensions_beside_large_ones() -> None:
    """One scale for a whole row would lose the small dimensions: the far ones are a thousand times as large."""
    x = residual_stream()
    small = slice(3, 60)
    assert fvu(x[:, small], read_back(x, "int8")[:, small]) < 1e-3
    step = x.abs().amax() / 127
    assert fvu(x[:, small], (x[:, small] / step).round() * step) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_a_dtype_holds_come_back_exactly(dtype: Dtype) -> None:
    exact = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype]
    x = torch.randint(-128, 128, (300, 7), generator=torch.Generator().manual_seed(0)).float()
    x[0], x[1] = -128, 127  # int8 then has a scale of 1
    assert torch.equal(x.to(exact).float(), x)
    assert torch.equal(read_back(x, dtype), x)
    stored, _ = encode(x, dtype)
    assert stored.dtype == stored_dtype(dtype)


def test_every_bfloat16_of_ordinary_size_is_exact_in_float16() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    ordinary = bits[(bits.abs() >= 2**-14) & (bits.abs() <= 32752)].reshape(-1, 1)
    assert torch.equal(read_back(ordinary, "float16"), ordinary)


@pytest.mark.parametrize(("largest", "exponent"), [(32752.0, 0), (32753.0, 1), (65504.0, 1), (65505.0, 2), (1e9, 15)])
def test_float16_divides_what_is_too_large_by_a_power_of_two(largest: float, exponent: int) -> None:
    x = torch.tensor([[largest, 1.5, -0.25], [-largest, 3.0, 0.0]])
    stored, encoding = encode(x, "float16")
    assert encoding.exponent == exponent
    assert np.isfinite(stored).all()
    back = decode(torch.from_numpy(stored), encoding)
    assert torch.allclose(back, x, rtol=2**-11, atol=2**-10)
    assert torch.equal(back[:, 1:], x[:, 1:])  # beside an outlier ordinary values keep their digits


@given(data=st.data())
@settings(max_examples=100)
def test_int8_is_off_by_half_a_step_at_most(data: st.DataObject) -> None:
    values = st.floats(-1e6, 1e6, width=32)
    n_rows, d_in = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.lists(values, min_size=d_in, max_size=d_in), min_size=n_rows, max_size=n_rows))
    x = torch.tensor(rows, dtype=torch.float32)
    step = (x.amax(0).double() - x.amin(0).double()) / 255
    rounding = x.abs().amax(0).double() * 2**-21  # of float32, where the offset is large beside the step
    assert ((read_back(x, "int8").double() - x).abs() <= step * 0.5001 + rounding + 1e-37).all()


def test_a_constant_dimension_comes_back_exactly() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.1
    stored, encoding = encode(x, "int8")
    assert torch.equal(decode(torch.from_numpy(stored), encoding)[:, 1], x[:, 1])
    assert (stored[:, 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dtype: Dtype, value: float) -> None:
    x = torch.zeros(10, 4)
    x[7, 2] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        encode(x, dtype)
    with pytest.raises(InputError, match=r"dimension 2: .*NaN or infinite"):
        choose_encoding(dtype, *torch.aminmax(x, dim=0))


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 2e9), ("bfloat16", 3.4e38), ("float32", 1e39), ("int8", 1e39)]
)
def test_what_does_not_fit_is_refused_with_the_limit(dtype: Dtype, value: float) -> None:
    with pytest.raises(InputError, match=f"too large for {dtype}, which goes up to"):
        encode(torch.tensor([[value], [0.0]], dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_part_are_stored_as_the_whole_is(dtype: Dtype) -> None:
    x = residual_stream(20_001, 5)
    stored, encoding = encode(x, dtype)
    assert encoding == choose_encoding(dtype, *torch.aminmax(x, dim=0))
    blocks = [encode_as(block, encoding) for block in x.split(700)]
    assert np.array_equal(np.concatenate(blocks), stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_s_bfloat16_is_encoded_as_its_float32(dtype: Dtype) -> None:
    x = residual_stream(100, 9).bfloat16()
    for ours, same in zip(encode(x, dtype), encode(x.float(), dtype), strict=True):
        assert np.array_equal(ours, same) if isinstance(ours, np.ndarray) else ours == same


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_without_rows_has_an_encoding(dtype: Dtype) -> None:
    stored, encoding = encode(torch.empty(0, 3), dtype)
    assert stored.shape == (0, 3)
    assert decode(torch.from_numpy(stored), encoding).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_parts_decode_as_each_part_alone(dtype: Dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(30, 6, generator=generator) * scale for scale in (1.0, 1e5, 3.0, 1e8)]
    encoded = [encode(part, dtype) for part in parts]
    decoder = Decoder([encoding for _, encoding in encoded], 6, "cpu")
    assert decoder.is_same == (dtype in ("float32", "bfloat16"))
    part = torch.randint(0, 4, (200,), generator=generator)
    row = torch.randint(0, 30, (200,), generator=generator)
    raw = torch.from_numpy(np.stack([encoded[p][0][r] for p, r in zip(part.tolist(), row.tolist(), strict=True)]))
    alone = [decode(torch.from_numpy(stored), encoding) for stored, encoding in encoded]
    expected = torch.stack([alone[p][r] for p, r in zip(part.tolist(), row.tolist(), strict=True)])
    assert torch.equal(decoder(raw, part), expected)
    if not decoder.is_same:
        with pytest.raises(ValueError, match="say which part"):
            decoder(raw)
    one = Decoder([encoded[1][1]], 6, "cpu")
    assert torch.equal(one(torch.from_numpy(encoded[1][0])), alone[1])


def test_an_encoding_has_the_fields_of_its_dtype_alone() -> None:
    with pytest.raises(ValueError, match="only float16 has"):
        Encoding(dtype="bfloat16", exponent=1)
    with pytest.raises(ValueError, match="int8 has scale and offset"):
        Encoding(dtype="int8", scale="AAAAAA==")
    with pytest.raises(ValueError, match="int8 has scale and offset"):
        Encoding(dtype="float16", offset="AAAAAA==")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_decodes_to_the_same_bits(dtype: Dtype) -> None:
    parts = [residual_stream(500, 33), residual_stream(500, 33) * 1e3]
    encoded = [encode(part, dtype) for part in parts]
    raw = torch.from_numpy(np.concatenate([stored for stored, _ in encoded]))
    part = torch.arange(2).repeat_interleave(500)
    encodings = [encoding for _, encoding in encoded]
    assert torch.equal(Decoder(encodings, 33, "cuda")(raw, part).cpu(), Decoder(encodings, 33, "cpu")(raw, part))
