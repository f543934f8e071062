"""Integers of few bits in int32 words, as files hold them: unsigned, q + 2^(bits - 1), the first in the lowest bits."""

import torch
import torch.nn.functional as F
from torch import Tensor

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AutoAWQ's (version gemm) each of eight columns is: columns 0, 2, 4, 6 come first, then 1, 3, 5, 7."""


def per_word(bits: int) -> int:
    """Integers in a word."""
    return 32 // bits


def unpacked(words: Tensor, bits: int) -> Tensor:
    """words [..., n] int32 -> [..., n * 32 / bits] int8 from -2^(bits - 1) on. bits: 4 or 8. Goes over bytes, so that there is no
    copy of four bytes for each integer."""
    low_first = _flat(words).view(torch.uint8)  # a word's bytes, the lowest first, as on all machines that torch runs on
    if bits == 8:
        values = (low_first ^ 128).view(torch.int8)
    else:
        values = torch.stack((low_first & 15, low_first >> 4), -1).view(torch.int8).sub_(8)
    return values.view(*words.shape[:-1], words.shape[-1] * per_word(bits))


def packed(values: Tensor, bits: int) -> Tensor:
    """values [..., n] int8 -> [..., ceil(n * bits / 32)] int32; the last word is filled up with 0 bits."""
    unsigned = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -values.shape[-1] % per_word(bits)))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return _flat(unsigned).view(torch.int32).view(*values.shape[:-1], -(-values.shape[-1] // per_word(bits)))


def awq_ordered(values: Tensor) -> Tensor:
    """values [..., n] as they lie in AutoAWQ's words -> the same in the order of the columns."""
    count = len(_AWQ_PLACES)
    return values.reshape(*values.shape[:-1], -1, count)[..., list(_AWQ_PLACES)].flatten(-2)


def _flat(values: Tensor) -> Tensor:
    """[n] with a stride of 1, which contiguous() and view() alone do not give where there is but one element."""
    return values.contiguous().as_strided((values.numel(),), (1,))
