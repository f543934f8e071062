"""A decoder's parts by the native kernels: layers that stay in C++ from one collective to the next, attention, linears.

With one rank an iteration is a single call. With tensor parallelism a layer is two, each of which gives this rank's part of a sum
that the group makes. Hidden states are fp32 whatever the weights are in.
"""

import ctypes
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.shape import ModelShape
from kv.pool import KVPool
from parallel.linear import Multiply
from parallel.partition import Partition
from workers.attention.spans import PagedSpans
from workers.decoder import DecoderLayer, Norm, TokenBatch
from workers.native.library import (
    DTYPES,
    KV_DTYPES,
    Batch,
    Dimensions,
    Layer,
    Library,
    Packed,
    PackedLinear,
    PackedQuantized,
    PackedQuantizedPart,
    Paged,
    Threads,
    address,
)
from workers.native.picker import NativePicker
from workers.quantization.activations import Exchange
from workers.quantization.weight import QuantizedWeight
from workers.rope import Rope
from workers.weights import Weight


class NativeKernels:
    """See workers.kernels.Kernels."""

    cpu_dtypes: Collection[torch.dtype] = DTYPES

    def __init__(self, library: Library, threads: int) -> None:
        self.threads = Threads(library, threads)

    def linear(self, weight: Weight, bias: Tensor | None, exchange: Exchange | None = None) -> Multiply:
        """See Kernels."""
        if isinstance(weight, QuantizedWeight) and weight.scheme.dynamic and exchange is not None:
            return PackedQuantizedPart(weight, self.threads, exchange)
        return self._packed(weight, bias)

    def gate_up(self, weight: Weight, bias: Tensor | None) -> Multiply:
        """See Kernels; the result is for a NativeLayers only."""
        return self._packed(weight, bias, paired=True)

    def _packed(self, weight: Weight, bias: Tensor | None, *, paired: bool = False) -> Packed:
        if isinstance(weight, QuantizedWeight):
            return PackedQuantized(weight, bias, self.threads, paired=paired)
        return PackedLinear(weight, bias, self.threads, paired=paired)

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """See Kernels: in fp32."""
        wide, library = weight.float().contiguous(), self.threads.library

        def norm(x: Tensor) -> Tensor:
            x = x.float().contiguous()
            y = torch.empty_like(x)
            library.run("norm", x.data_ptr(), len(x), len(wide), wide.data_ptr(), eps, y.data_ptr())
            return y

        return norm

    def head(self, weight: Weight, dtype: torch.dtype) -> Multiply:
        """See Kernels: in dtype, which hidden states are rounded to; for a quantized weight they stay fp32."""
        return self._packed(weight if isinstance(weight, QuantizedWeight) else weight.to(dtype), None)

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See Kernels."""
        return torch.float32

    def stack(
        self, shape: ModelShape, part: Partition, layers: Sequence[DecoderLayer], rope: Rope, dtype: torch.dtype
    ) -> "NativeLayers":
        """See Kernels."""
        return NativeLayers(shape, part, layers, rope, dtype, self.threads)

    def attention(self, pool: KVPool, windows: Sequence[int | None], dtype: torch.dtype) -> "NativeAttention":
        """See Kernels; in fp32 whatever dtype is."""
        return NativeAttention(pool, windows, self.threads)

    def picker(self, vocab_size: int, device: torch.device) -> NativePicker:
        """See Kernels."""
        return NativePicker(vocab_size, self.threads)

    def awake(self) -> Threads:
        """See Kernels."""
        return self.threads


class NativeAttention:
    """See workers.attention.AttentionBackend."""

    def __init__(self, pool: KVPool, windows: Sequence[int | None], threads: Threads) -> None:
        self.pool = pool
        self.windows = windows
        self.threads = threads

    def prepare(self, spans: PagedSpans) -> "NativeStep":
        """See AttentionBackend."""
        arrays = tuple(np.ascontiguousarray(a) for a in (spans.start, spans.end, spans.first_row, spans.tables, spans.first_block))
        return NativeStep(self, spans.block_size, arrays)


@dataclass(frozen=True)
class NativeStep:
    """One iteration's spans, where C++ finds them."""

    backend: NativeAttention
    block_size: int
    arrays: tuple[NDArray[np.int64], ...]
    """start, end, first_row, tables, first_block of PagedSpans."""

    def paged(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Paged:
        """For layers of so many heads; good as long as this object is."""
        return Paged(len(self.arrays[0]), self.block_size, num_heads, num_kv_heads, head_dim, *map(address, self.arrays))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See AttentionStep; keys and values are read from the pool. NativeLayers does this itself."""
        n, heads, size = queries.shape
        pool, wide = self.backend.pool, queries.float().contiguous()
        output = torch.empty(n, heads * size)
        place = (*pool.addresses(layer), KV_DTYPES.index(pool.dtype))
        paged = self.paged(heads, pool.num_kv_heads, size)
        window = self.backend.windows[layer] or 0
        with self.backend.threads as threads:
            where = (wide.data_ptr(), n, *place, window, output.data_ptr(), threads.handle)
            threads.library.run("attend", ctypes.byref(paged), *where)
        return output.to(queries.dtype)


class NativeLayers:
    """See workers.decoder.LayerStack."""

    hidden_dtype = torch.float32

    def __init__(
        self,
        shape: ModelShape,
        part: Partition,
        layers: Sequence[DecoderLayer],
        rope: Rope,
        dtype: torch.dtype,
        threads: Threads,
    ) -> None:
        """layers: with linears of NativeKernels."""
        self._heads = (len(part.heads), len(part.kv_heads), shape.head_dim)
        self._windows = shape.windows[part.layers.start : part.layers.stop]
        self.layers = tuple(layers)
        self._cos, self._sin = rope.halves()
        self._threads = threads
        dimensions = Dimensions(shape.hidden_size, *self._heads, len(part.inner), shape.rms_norm_eps)
        half = dtype == torch.bfloat16
        self._model = threads.library.make("model", self, ctypes.byref(dimensions), half, threads.handle)
        self._norms = [_norms(layer, len(part.heads)) for layer in layers]
        self._over: weakref.WeakKeyDictionary[KVPool, ctypes.Array[Layer]] = weakref.WeakKeyDictionary()

    def run(self, batch: TokenBatch, pool: KVPool, hidden: Tensor) -> Tensor:
        """See LayerStack; hidden is overwritten."""
        over = self._over.get(pool)
        if over is None:
            over = self._over[pool] = self._layers_over(pool)
        assert hidden.dtype == torch.float32
        assert hidden.is_contiguous()
        step = cast(NativeStep, batch.attention)
        native = Batch(
            len(hidden), hidden.data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr(), self._cos.data_ptr(),
            self._sin.data_ptr(), step.paged(*self._heads),
        )  # fmt: skip
        with self._threads as threads:
            if self.layers[0].output.group.size == 1:
                threads.library.run("layers", self._model, ctypes.byref(native), over, 0, len(self.layers))
                return hidden
            part = torch.empty_like(hidden)
            for layer, place in zip(self.layers, over, strict=True):
                for half, linear in (("attention_part", layer.output), ("mlp_part", layer.down)):
                    threads.library.run(half, self._model, ctypes.byref(native), ctypes.byref(place), part.data_ptr())
                    hidden += linear.total(part)
        return hidden

    def spent(self) -> dict[str, float]:
        """Seconds so far: in linears, in attention, and in what is done row by row."""
        seconds = np.zeros(3)
        self._threads.library.run("model_spent", self._model, address(seconds))
        return dict(zip(("linears", "attention", "rows"), seconds.tolist(), strict=True))

    def _layers_over(self, pool: KVPool) -> "ctypes.Array[Layer]":
        places = []
        for number, (layer, norms) in enumerate(zip(self.layers, self._norms, strict=True)):
            linears = (layer.qkv, layer.output.own, layer.gate_up, layer.down.own)
            places.append(
                Layer(
                    *map(address, norms),
                    *(cast(Packed, linear).handle for linear in linears),
                    *pool.addresses(number),
                    KV_DTYPES.index(pool.dtype),
                    self._windows[number] or 0,
                )
            )
        return (Layer * len(places))(*places)


def _norms(layer: DecoderLayer, num_heads: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, mlp, query, key; the weights of the last two are the same for all heads."""
    both = (None, None) if layer.qk_norm is None else (layer.qk_norm[0], layer.qk_norm[num_heads])
    wide = [None if x is None else x.float().contiguous() for x in (layer.input_norm, layer.mlp_norm, *both)]
    return cast(tuple[Tensor, Tensor, Tensor | None, Tensor | None], tuple(wide))
