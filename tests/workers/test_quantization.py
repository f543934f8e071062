"""Linear quantization of weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.schemes import Scheme, parse_precision
from workers.quantization.activations import requantized
from workers.quantization.linear import TorchQuantizedLinear, TorchQuantizedPart
from workers.quantization.weight import Ranging, quantize, side_by_side

NAMES = ["int8", "int8-asym", "int8-g32", "int8-asym-tensor", "int4-g32", "int4-asym-g64", "int4-tensor", "fp8", "fp8-tensor"]


def scheme(name: str) -> Scheme:
    found = parse_precision(name)
    assert isinstance(found, Scheme)
    return found


def weight(rows: int = 48, columns: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(name: str, of: Tensor, ranging: Ranging = "minmax") -> float:
    return float((quantize(of, scheme(name), ranging).dequantized() - of).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_a_value_is_off_by_half_a_step_at_most(name: str) -> None:
    kept = quantize(weight(), scheme(name))
    lost = (kept.dequantized() - weight()).abs()
    step = kept.scale.repeat_interleave(kept.group_size, dim=1)
    if kept.scheme.kind == "float":  # 3 bits of mantissa, and steps of 2^-9 where it is denormal
        assert (lost <= torch.maximum(weight().abs() / 16, step * 2**-10) * 1.001).all()
    else:
        assert (lost <= step * 0.5001).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_stays_zero(name: str) -> None:
    some = weight().clamp(min=-0.5)
    some[3], some[:, 7] = 0.0, 0.0
    again = quantize(some, scheme(name)).dequantized()
    assert not again[3].any()
    assert not again[:, 7].any()


def test_asymmetric_loses_less_of_skewed_data() -> None:
    skewed = weight().exp()
    for symmetric, asymmetric in (("int8", "int8-asym"), ("int4-g64", "int4-asym-g64"), ("int4-tensor", "int4-asym-tensor")):
        assert error(asymmetric, skewed) < 0.7 * error(symmetric, skewed)


def test_a_searched_range_loses_less() -> None:
    for name in ("int4-g64", "int4-tensor", "int8-tensor"):
        assert error(name, weight(), "mse") < error(name, weight())
    outliers = weight(8, 4096)
    outliers[:, 5] = 40.0
    assert error("int4-tensor", outliers, "mse") <= error("int4-tensor", outliers)
    rest = torch.arange(4096) != 5  # what is not cut off keeps more
    kept = quantize(outliers, Scheme(4), "percentile").dequantized()
    assert (kept - outliers)[:, rest].square().mean() < 0.1 * (quantize(outliers, Scheme(4)).dequantized() - outliers)[
        :, rest
    ].square().mean()


@given(st.sampled_from([n for n in NAMES if "tensor" not in n]), st.integers(0, 2**16), st.data())
def test_a_quantized_cut_is_a_cut_of_the_quantized(name: str, seed: int, data: st.DataObject) -> None:
    whole = weight(12, 128, seed)
    kept = quantize(whole, scheme(name))
    rows = data.draw(st.tuples(st.integers(0, 6), st.integers(7, 12)).map(lambda ends: range(*ends)))
    unit = scheme(name).group_size
    if unit:  # of channels, other columns have other ranges
        columns = data.draw(
            st.tuples(st.integers(0, 128 // unit - 1), st.just(128 // unit)).map(lambda e: range(e[0] * unit, e[1] * unit))
        )
        kept, whole = kept.columns(columns), whole[:, columns.start : columns.stop]
    cut, again = kept.rows(rows), quantize(whole[rows.start : rows.stop], scheme(name))
    assert torch.equal(cut.values.view(torch.int8), again.values.view(torch.int8))
    assert torch.equal(cut.scale, again.scale)


@given(st.sampled_from(NAMES), st.integers(0, 126), st.integers(127, 128))
def test_any_columns_keep_their_values(name: str, start: int, stop: int) -> None:
    kept = quantize(weight(6, 128), scheme(name))
    assert torch.equal(kept.columns(range(start, stop)).dequantized(), kept.dequantized()[:, start:stop])


def test_parts_stand_side_by_side() -> None:
    parts = [quantize(weight(8, 64, seed), scheme("int4-asym-g32")) for seed in range(3)]
    assert torch.equal(side_by_side(parts).dequantized(), torch.cat([p.dequantized() for p in parts]))


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="100 inputs do not divide into groups of 32"):
        quantize(weight(4, 100), scheme("int4-g32"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_of_dynamic_int8_add_up_to_the_same_bits(ranks: int) -> None:
    x, kept = weight(9, 192, 1) * 3, quantize(weight(40, 192), scheme("int8-dynamic"))
    largest = x.abs().amax(-1)
    cuts = [range(i * 192 // ranks, (i + 1) * 192 // ranks) for i in range(ranks)]
    parts = [TorchQuantizedPart(kept.columns(cut), lambda _: largest) for cut in cuts]
    sums = [part(x[:, cut.start : cut.stop].contiguous()) for part, cut in zip(parts, cuts, strict=True)]
    assert torch.equal(parts[0].finish(torch.stack(sums).sum(0)), TorchQuantizedLinear(kept)(x))


@given(st.sampled_from(["int8-dynamic", "fp8-dynamic", "int4-g32-dynamic"]), st.integers(0, 2**16))
def test_dynamic_activations_are_off_by_half_a_step(name: str, seed: int) -> None:
    x, kept = weight(5, 64, seed) * 2.0 ** (seed % 9 - 4), quantize(weight(16, 64, seed + 1), scheme(name))
    x[3] = 0.0
    lost = (requantized(x, kept.scheme.kind) - x).abs()
    bound = (
        x.abs() / 16 + x.abs().amax() * 2**-9 if kept.scheme.kind == "float" else x.abs().amax(-1, keepdim=True) / 127.5 * 0.5001
    )
    assert (lost <= bound).all()
    wanted = requantized(x, kept.scheme.kind).double() @ kept.dequantized().double().t()
    torch.testing.assert_close(TorchQuantizedLinear(kept)(x).double(), wanted, atol=1e-5 * float(x.abs().max()), rtol=1e-4)
