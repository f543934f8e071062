"""How keys and values are kept: as floating-point numbers, or quantized to a byte each, and the formulas of that.

What is quantized is a vector, the key or value of one token and one head: new tokens then never change what is stored of others,
and what is read doesn't depend on how a prompt was cut. A pool's row is one token's:

    [num_kv_heads, head_dim] bytes, one for each number, then [num_kv_heads, parameters] bf16

    int8  x = scale * code + minimum, code in [0, 255]: asymmetric, since keys of a channel lie on one side of 0 (Liu et al. 2024,
          KIVI, section 3)
    fp8   x = scale * code, code e4m3 (Micikevicius et al. 2022)

The parameters are rounded outwards to bf16, so that the codes reach all numbers of the vector; then come the codes, by the rounded
parameters. Of a vector with a number that is not finite nothing is kept: it is read as NaN.

workers/native/kv.h does the same in C++, to the bit.
"""

import torch
from torch import Tensor

INT8, FP8 = torch.int8, torch.float8_e4m3fn
PARAMETERS = {INT8: 2, FP8: 1}
"""Of each quantized vector: scale and minimum, or scale."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": INT8, "fp8": FP8}
"""By the names that `Config.kv_dtype` has for them."""
DEQUANTIZED_BYTES = 12
"""What a number takes, at most, while dequantize() makes it."""

_FP8_LARGEST = 448.0
_UPPER = -0x10000  # the half of an fp32 that is a bf16


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether KV kept in dtype is codes with parameters."""
    return dtype in PARAMETERS


def vector_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """What a key or value of one head takes."""
    return head_dim + 2 * PARAMETERS[dtype] if is_quantized(dtype) else head_dim * dtype.itemsize


def quantize(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """vectors [num_tokens, num_kv_heads, head_dim], of any floating-point dtype -> rows [num_tokens, row bytes] uint8."""
    wide = vectors.float()
    if dtype == INT8:
        minimum = _downwards(wide.amin(-1) + 0.0)  # no -0
        scale = _upwards((wide.amax(-1) - minimum) / 255)
        scale, minimum = _nan_unless_finite(scale, scale), _nan_unless_finite(scale, minimum)
        codes = _over(wide - minimum[..., None], scale).round().clamp(0, 255).to(torch.uint8)
        parameters = [scale, minimum]
    else:
        scale = _upwards(wide.abs().amax(-1) / _FP8_LARGEST)
        scale = _nan_unless_finite(scale, scale)
        codes = _over(wide, scale).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(FP8).view(torch.uint8)
        parameters = [scale]
    beside = torch.stack(parameters, -1).to(torch.bfloat16).view(torch.uint8)  # exact
    return torch.cat([codes.flatten(1), beside.flatten(1)], dim=1)


def dequantize(rows: Tensor, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Rows that quantize() made -> [num_tokens, num_kv_heads, head_dim] fp32."""
    codes, beside = rows[:, : num_kv_heads * head_dim], rows[:, num_kv_heads * head_dim :]
    beside = beside.clone(memory_format=torch.contiguous_format)  # begins where a bf16 may
    parameters = beside.view(torch.bfloat16).float().view(len(rows), num_kv_heads, PARAMETERS[dtype], 1)
    numbers = (codes if dtype == INT8 else codes.contiguous().view(FP8)).float().view(len(rows), num_kv_heads, head_dim)
    scaled = numbers * parameters[:, :, 0]
    return scaled + parameters[:, :, 1] if dtype == INT8 else scaled


def _over(numbers: Tensor, scale: Tensor) -> Tensor:
    """numbers [..., n] / scale [...]; 0 where the scale is 0 or NaN."""
    wide = scale[..., None]
    return torch.where(wide > 0, numbers / wide, 0.0)


def _nan_unless_finite(judge: Tensor, numbers: Tensor) -> Tensor:
    return numbers.masked_fill(~judge.isfinite(), torch.nan)


def _upwards(numbers: Tensor) -> Tensor:
    """The next bf16 that is no less; of numbers that are not negative, or NaN."""
    return ((numbers.view(torch.int32) + 0xFFFF) & _UPPER).view(torch.float32)


def _downwards(numbers: Tensor) -> Tensor:
    """The next bf16 that is no greater."""
    bits = numbers.view(torch.int32)
    return (torch.where(numbers < 0, bits + 0xFFFF, bits) & _UPPER).view(torch.float32)
