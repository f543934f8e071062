"""What a decoder is computed by: torch's operators anywhere, the native kernels on CPUs."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from cluster.config import Config, ConfigError
from cluster.shape import ModelShape
from kv.pool import KVPool
from parallel.linear import Linear, Multiply, cpu_computes_bfloat16
from parallel.partition import Partition
from parallel.vocabulary import WideLinear
from workers.attention import AttentionBackend, make_attention
from workers.decoder import DecoderLayer, LayerStack, Norm, TorchLayers, rms_norm
from workers.picker import Picker, TorchPicker
from workers.quantization.activations import Exchange
from workers.quantization.linear import TorchQuantizedHead, TorchQuantizedLinear, TorchQuantizedPart
from workers.quantization.weight import QuantizedWeight
from workers.rope import Rope
from workers.weights import Weight

MakeLinear = Callable[[Weight, Tensor | None], Multiply]
"""Of weight [out_features, in_features] and bias [out_features] or None."""


class Kernels(Protocol):
    """Makes the parts of a Decoder."""

    cpu_dtypes: Collection[torch.dtype]
    """Of weights, multiplied well on a CPU."""

    def linear(self, weight: Weight, bias: Tensor | None, exchange: Exchange | None = None) -> Multiply:
        """weight [out_features, in_features], bias [out_features] or None.

        exchange: with the ranks that have other features of the same tokens, where there are such; then there is no bias, and if
        activations are quantized, they are by the range of all, and the result is a parallel.linear.Deferred.
        """

    def gate_up(self, weight: Weight, bias: Tensor | None) -> Multiply:
        """The same of gate over up, whose outputs are multiplied in the stack."""

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """RMSNorm with `weight` [hidden]."""

    def head(self, weight: Weight, dtype: torch.dtype) -> Multiply:
        """The lm_head [vocab, hidden], whose output is fp32, for hidden states computed in dtype."""

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of hidden states, with weights in dtype."""

    def stack(
        self, shape: ModelShape, part: Partition, layers: Sequence[DecoderLayer], rope: Rope, dtype: torch.dtype
    ) -> LayerStack:
        """The layers, whose linears were made here."""

    def attention(self, pool: KVPool, windows: Sequence[int | None], dtype: torch.dtype) -> AttentionBackend:
        """Over a pool, for layers with these sliding windows that are computed in dtype."""

    def picker(self, vocab_size: int, device: torch.device) -> Picker:
        """Draws tokens."""

    def awake(self) -> AbstractContextManager[object]:
        """Held while a step runs: its threads need not be woken for each part."""


class TorchKernels:
    """torch's operators."""

    def __init__(self, attention: str = "torch") -> None:
        """attention: see make_attention."""
        self._attention = attention
        self.cpu_dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16) if cpu_computes_bfloat16() else (torch.float32,)

    def linear(self, weight: Weight, bias: Tensor | None, exchange: Exchange | None = None) -> Multiply:
        """See Kernels."""
        if isinstance(weight, QuantizedWeight):
            if weight.scheme.dynamic and exchange is not None:
                return TorchQuantizedPart(weight, exchange)
            return TorchQuantizedLinear(weight, bias)
        return Linear(weight, bias)

    gate_up = linear

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """See Kernels."""
        return lambda x: rms_norm(x, weight, eps)

    def head(self, weight: Weight, dtype: torch.dtype) -> Multiply:
        """See Kernels."""
        if isinstance(weight, QuantizedWeight):
            return TorchQuantizedHead(weight)
        return WideLinear(weight if weight.device.type == "cpu" else weight.to(dtype))

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See Kernels."""
        return dtype

    def stack(
        self, shape: ModelShape, part: Partition, layers: Sequence[DecoderLayer], rope: Rope, dtype: torch.dtype
    ) -> LayerStack:
        """See Kernels."""
        return TorchLayers(shape, part, rope, tuple(layers), dtype)

    def attention(self, pool: KVPool, windows: Sequence[int | None], dtype: torch.dtype) -> AttentionBackend:
        """See Kernels."""
        return make_attention(self._attention, pool, windows, dtype)

    def picker(self, vocab_size: int, device: torch.device) -> Picker:
        """See Kernels."""
        return TorchPicker(vocab_size, device)

    def awake(self) -> AbstractContextManager[object]:
        """See Kernels."""
        return nullcontext()


def choose_kernels(config: Config, device: torch.device) -> Kernels:
    """What `config.kernels` asks for. Raises ConfigError where that cannot be had.

    Native kernels take as many threads as torch has in the calling thread.
    """
    if config.kernels in ("torch", "reference"):
        return TorchKernels(config.kernels)
    asked = config.kernels == "native"
    if device.type != "cpu" or config.dtype == "float16":
        if asked:
            raise ConfigError(f"native kernels compute in float32 and bfloat16 on CPUs, not in {config.dtype} on {device.type}")
        return TorchKernels()
    from workers.native.kernels import NativeKernels
    from workers.native.library import library

    built = library()
    if built is None and asked:
        raise ConfigError("native kernels cannot be built here (the log says why); --kernels torch needs no compiler")
    return TorchKernels() if built is None else NativeKernels(built, torch.get_num_threads())
