"""Linears over quantized weights by the native kernels: against float64, rows against themselves, one CPU against others."""

import pytest
import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.schemes import Scheme, parse_precision
from tests.workers.builds import built_for
from workers.native.library import Library, PackedQuantized, PackedQuantizedPart, Threads
from workers.quantization.linear import TorchQuantizedLinear
from workers.quantization.weight import FP8, QuantizedWeight, quantize

WEIGHT_ONLY = ["int8", "int8-asym", "int8-g8", "int8-asym-g24", "int8-tensor", "int4-g8", "int4-asym-g24", "int4-tensor", "fp8"]
DYNAMIC = ["int8-dynamic", "int8-tensor-dynamic", "int4-g8-dynamic", "int4-g24-dynamic", "int4-tensor-dynamic", "fp8-dynamic"]
GROUPED, WHOLE = [(24, 5), (72, 257), (1032, 100)], [(1, 1), (17, 5), (33, 257), (1024, 100), (513, 130)]


def cases(schemes: list[str]) -> list[tuple[str, int, int]]:
    """Each with sizes that its groups divide."""
    return [(name, *size) for name in schemes for size in (GROUPED if "-g" in name else WHOLE)]


def quantized(name: str, inputs: int, outputs: int) -> QuantizedWeight:
    """Random weights, off centre so that zero-points matter, and of channels of different sizes."""
    scheme = parse_precision(name)
    assert isinstance(scheme, Scheme)
    weight = (torch.randn(outputs, inputs) + 0.3) * torch.rand(outputs, 1)
    return quantize(weight, scheme)


def rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """Activations as a dynamic scheme quantizes them, in float64."""
    largest = x.abs().amax(1, keepdim=True)
    if scheme.kind == "float":
        scale = largest / 448.0
        return (x / scale).clamp(-448, 448).to(FP8).double() * scale.double()
    scale = largest * 2 / 255
    return (x / scale).round().clamp(-128, 127).double() * scale.double()


def check(weight: QuantizedWeight, x: Tensor, bias: Tensor, y: Tensor) -> None:
    """Against float64, with the error that roundings of fp32 may make. A dynamic scheme's sums of integers are exact, so few are
    left; others are rounded with weights of the size of all steps of the scheme, from which the zero-point is then taken off."""
    scheme, size = weight.scheme, weight.group_size
    taken = rounded(x, scheme) if scheme.dynamic else x.double()
    zero = 0.0 if weight.zero_point is None else weight.zero_point.double().repeat_interleave(size, 1)
    scale = weight.scale.double().repeat_interleave(size, 1)
    exact = (weight.values.double() - zero) * scale
    integers = scheme.dynamic and scheme.kind == "int"
    largest = exact.abs() if integers or scheme.kind == "float" else scale * 2**scheme.bits
    room = taken.abs() @ largest.T + bias.double().abs()
    error = (y.double() - (taken @ exact.T + bias.double())).abs() / room
    assert error.max() < (4 if integers else 16) * 2**-24


def check_rows(linear: PackedQuantized, x: Tensor, whole: Tensor) -> None:
    """Bitwise."""
    for rows in (*range(1, 14), 64, 70):
        assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize(("name", "inputs", "outputs"), cases(WEIGHT_ONLY + DYNAMIC))
def test_a_quantized_linear_is_the_product_whatever_the_number_of_rows(
    library: Library,
    name: str,
    inputs: int,
    outputs: int,
) -> None:
    torch.manual_seed(0)
    weight, bias = quantized(name, inputs, outputs), torch.randn(outputs)
    x = torch.randn(71, inputs) * torch.rand(71, 1) * 10
    linear = PackedQuantized(weight, bias, Threads(library, 2))
    whole = linear(x)
    check(weight, x, bias, whole)
    check_rows(linear, x, whole)
    assert torch.equal(PackedQuantized(weight, bias, Threads(library, 1))(x), whole)


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *DYNAMIC])
def test_the_bits_are_those_of_avx512(name: str) -> None:
    torch.manual_seed(1)
    weight, x = quantized(name, 72, 100), torch.randn(11, 72)
    ways = ("avx2", "avx512", "avx512-bf16")
    one, *others = (PackedQuantized(weight, torch.ones(100), Threads(built_for(way), 1))(x) for way in ways)
    for other in others:
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["int8-asym", "int4-g8", "int4-g8-dynamic", "int8-dynamic", "fp8-dynamic"])
def test_gate_and_up_are_the_same_bits_and_a_bad_row_spoils_no_other(library: Library, name: str) -> None:
    torch.manual_seed(2)
    threads = Threads(library, 2)
    weight, bias, x = quantized(name, 40, 2 * 43), torch.randn(86), torch.randn(9, 40)
    paired = PackedQuantized(weight, bias, threads, paired=True)
    good = PackedQuantized(weight, bias, threads)(x)
    assert torch.equal(paired(x), good)
    x[4, 3], x[7, 0] = torch.nan, torch.inf
    spoilt = paired(x)
    assert not spoilt[[4, 7]].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(spoilt[others], good[others])


def test_zeros_are_zeros_and_other_groups_are_refused(library: Library) -> None:
    threads = Threads(library, 1)
    for name in (*WEIGHT_ONLY, *DYNAMIC):
        linear = PackedQuantized(quantized(name, 24, 9), None, threads)
        assert torch.equal(linear(torch.zeros(3, 24)), torch.zeros(3, 9))
    with pytest.raises(ConfigError, match="groups of 4 inputs: the native kernels take multiples of 8"):
        PackedQuantized(quantized("int8-g4", 24, 9), None, threads)
    with pytest.raises(ConfigError, match="65544 inputs: the native kernels take up to 65536"):
        PackedQuantized(quantized("int8", 65_544, 1), None, threads)


@pytest.mark.parametrize("name", ["int8-dynamic", "int4-g24-dynamic", "fp8-dynamic"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_several_ranks_are_rounded_by_the_range_of_all(library: Library, name: str, ranks: int) -> None:
    threads, weight, x = Threads(library, 2), quantized(name, 144, 70), torch.randn(9, 144) * 3
    x[4] = 0.0
    whole = PackedQuantized(weight, None, threads)(x)
    cuts = [range(i * 144 // ranks, (i + 1) * 144 // ranks) for i in range(ranks)]
    parts = [PackedQuantizedPart(weight.columns(cut), threads, lambda _: x.abs().amax(-1)) for cut in cuts]
    sums = torch.stack([part(x[:, cut.start : cut.stop]) for part, cut in zip(parts, cuts, strict=True)]).sum(0)
    if name == "int8-dynamic":  # whole numbers
        assert torch.equal(parts[0].finish(sums), whole)
        assert torch.equal(TorchQuantizedLinear(weight)(x), whole)
    torch.testing.assert_close(parts[0].finish(sums), whole, atol=1e-4, rtol=1e-5)


def test_ranks_that_cannot_be_reached_are_an_error(library: Library) -> None:
    def gone(_: Tensor) -> Tensor:
        raise RuntimeError("the other rank is gone")

    part = PackedQuantizedPart(quantized("int8-dynamic", 24, 5), Threads(library, 1), gone)
    sums = part(torch.randn(2, 24))
    with pytest.raises(RuntimeError, match="the other rank is gone"):
        part.finish(sums)
