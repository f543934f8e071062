"""Quantized keys and values: what is lost at most, and what it saves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv.formats import FP8, INT8, dequantize, quantize, vector_bytes

QUANTIZED = pytest.mark.parametrize("dtype", [INT8, FP8])
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-10, 10, width=32) | st.floats(-(2.0**-100), 2.0**-100, width=32)


@st.composite
def some_vectors(draw: st.DrawFn) -> torch.Tensor:
    """[tokens, heads, head_dim] fp32"""
    tokens, heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    count = tokens * heads * size
    return torch.tensor(draw(st.lists(NUMBERS, min_size=count, max_size=count))).view(tokens, heads, size)


def again(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Kept and read."""
    tokens, heads, size = vectors.shape
    rows = quantize(vectors, dtype)
    assert rows.dtype == torch.uint8
    assert rows.shape == (tokens, heads * vector_bytes(dtype, size))
    return dequantize(rows, heads, size, dtype)


@given(some_vectors())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_int8_is_off_by_half_a_step_at_most(vectors: torch.Tensor) -> None:
    """A step is a 255th of the range, which rounding its lower end and the step to bf16 makes a little wider."""
    lowest, highest = vectors.double().amin(-1), vectors.double().amax(-1)
    step = (highest - lowest + lowest.abs() / 128) / 255 * (1 + 1 / 128)
    lost = (again(vectors, INT8).double() - vectors.double()).abs()
    room = 1e-6 * torch.maximum(lowest.abs(), highest.abs()) + 1e-37
    assert (lost <= (step / 2 + room)[..., None]).all()


@given(some_vectors())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_fp8_is_off_by_a_sixteenth_of_a_number_or_a_share_of_the_greatest(vectors: torch.Tensor) -> None:
    """Three bits of mantissa; denormals are 2**-9 apart where the greatest is 448."""
    wide = vectors.double()
    lost = (again(vectors, FP8).double() - wide).abs()
    least = wide.abs().amax(-1, keepdim=True) / 448 * 2**-10 * (1 + 1 / 64)
    assert (lost <= torch.maximum(wide.abs() / 16, least) * (1 + 1e-5) + 1e-37).all()


@QUANTIZED
def test_a_vector_is_kept_the_same_whatever_stands_beside_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(40, 3, 24)
    whole = quantize(vectors, dtype)
    for first, end in ((0, 1), (7, 8), (3, 40)):
        assert torch.equal(quantize(vectors[first:end], dtype), whole[first:end])
    changed = vectors.clone()
    changed[:, 1] *= 100
    assert torch.equal(again(changed, dtype)[:, [0, 2]], again(vectors, dtype)[:, [0, 2]])


@QUANTIZED
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_spoils_its_own_vector_only(dtype: torch.dtype, bad: float) -> None:
    vectors = torch.randn(3, 2, 8)
    good = again(vectors, dtype)
    vectors[1, 0, 5] = bad
    spoilt = again(vectors, dtype)
    assert spoilt[1, 0].isnan().all()
    spoilt[1, 0] = good[1, 0]
    assert torch.equal(spoilt, good)


@QUANTIZED
def test_zeros_stay_zeros_and_an_unused_slot_reads_as_such(dtype: torch.dtype) -> None:
    assert not again(torch.zeros(2, 2, 8), dtype).any()
    assert not again(-torch.zeros(2, 2, 8), dtype).any()
    assert not dequantize(torch.zeros(2, 2 * vector_bytes(dtype, 8), dtype=torch.uint8), 2, 8, dtype).any()


def test_numbers_alike_are_kept_whole_by_int8() -> None:
    for number in (1.0, -3.5, 0.1, 1234.567, -7e-5):
        vectors = torch.full((1, 1, 16), number)
        torch.testing.assert_close(again(vectors, INT8), vectors, rtol=2e-5, atol=0)


def test_a_vector_takes_about_half_of_bf16() -> None:
    assert [vector_bytes(INT8, 128), vector_bytes(FP8, 128), vector_bytes(torch.bfloat16, 128)] == [132, 130, 256]
    assert [vector_bytes(INT8, 32), vector_bytes(FP8, 32), vector_bytes(torch.float32, 32)] == [36, 34, 128]
