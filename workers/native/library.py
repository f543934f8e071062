"""The native kernels as Python calls them: structs and functions as native.cpp has them, memory that is freed with its owner.

A call gives Python's lock back while it computes. Tensors and arrays are handed over as addresses: whoever calls keeps them alive,
contiguous and of the dtype that is said.
"""

import ctypes
import functools
import logging
import threading
import weakref
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_void_p
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.config import ConfigError
from workers.native.build import OWN_CPU, BuildError, build
from workers.quantization.activations import Exchange, Ranges, scaled
from workers.quantization.weight import FP8, QuantizedWeight

log = logging.getLogger(__name__)
_building = threading.Lock()

DTYPES = (torch.float32, torch.bfloat16)
"""Of weights."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3, "fp8": 4}
"""Of weights: Kind in packed.h."""
_UNIT = 8
"""Inputs that quantized weights are packed by."""
_MOST_INPUTS = 65_536
"""Of quantized weights: what the 32 bits of a sum of products have room for."""
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
"""Of KV pools, in the order of kv.h's Form."""


class Dimensions(Structure):
    """A rank's part of a decoder."""

    _fields_ = [
        ("hidden", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("inner", c_int64),
        ("eps", c_float),
    ]


class Layer(Structure):
    """Addresses of one layer's weights and pool."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("form", c_int64),
        ("window", c_int64),
    ]


class Paged(Structure):
    """One iteration's spans."""

    _fields_ = [
        ("num_spans", c_int64),
        ("block_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("start", c_void_p),
        ("end", c_void_p),
        ("first_row", c_void_p),
        ("tables", c_void_p),
        ("first_block", c_void_p),
    ]


class Batch(Structure):
    """One iteration's flat batch."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("hidden", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("paged", Paged),
    ]


_EXCHANGE = CFUNCTYPE(None, POINTER(c_float), c_int64)
"""Exchange in packed.h."""

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "instructions": (c_char_p, []),
    "threads": (c_void_p, [c_int]),
    "threads_free": (None, [c_void_p]),
    "begin": (None, [c_void_p]),
    "end": (None, [c_void_p]),
    "pack": (
        c_void_p,
        [c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int64, c_int64, c_int, c_void_p],
    ),
    "pack_exchange": (None, [c_void_p, _EXCHANGE]),
    "pack_free": (None, [c_void_p]),
    "linear": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    "norm": (None, [c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p]),
    "draws": (c_void_p, [c_int64, c_void_p]),
    "draws_free": (None, [c_void_p]),
    "draw": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    "attend": (c_int, [POINTER(Paged), c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int64, c_void_p, c_void_p]),
    "model": (c_void_p, [POINTER(Dimensions), c_int, c_void_p]),
    "model_free": (None, [c_void_p]),
    "model_spent": (None, [c_void_p, c_void_p]),
    "layers": (c_int, [c_void_p, POINTER(Batch), POINTER(Layer), c_int64, c_int64]),
    "attention_part": (c_int, [c_void_p, POINTER(Batch), POINTER(Layer), c_void_p]),
    "mlp_part": (c_int, [c_void_p, POINTER(Batch), POINTER(Layer), c_void_p]),
}


class Library:
    """The functions of a built library."""

    def __init__(self, cpu: Sequence[str] = OWN_CPU, extra: Sequence[str] = ()) -> None:
        """See build(). Raises BuildError."""
        try:
            loaded = ctypes.CDLL(str(build(cpu, extra)))
            self._functions = {name: getattr(loaded, f"rayline_{name}") for name in _SIGNATURES}
        except (OSError, AttributeError) as error:
            raise BuildError(str(error)) from None
        for name, (result, arguments) in _SIGNATURES.items():
            self._functions[name].restype, self._functions[name].argtypes = result, arguments

    @property
    def instructions(self) -> str:
        """What the kernels were built for: avx512-bf16, avx512, avx2 or portable."""
        told: bytes = self._functions["instructions"]()
        return told.decode()

    def make(self, kind: str, owner: object, *arguments: Any) -> int:
        """What function `kind` makes, freed with `owner`. Raises MemoryError."""
        made: int | None = self._functions[kind](*arguments)
        if not made:
            raise MemoryError(f"no memory for {kind}")
        # Not when the process ends: a thread may still compute then, and the memory goes with the process anyway.
        weakref.finalize(owner, self._functions[f"{kind}_free"], made).atexit = False
        return made

    def run(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises MemoryError where it has no memory to work in."""
        if self._functions[name](*arguments):
            raise MemoryError(f"no memory to compute in ({name})")


def library() -> Library | None:
    """That of this CPU; None where it cannot be built. Either is logged once."""
    with _building:
        return _built()


@functools.cache
def _built() -> Library | None:
    try:
        built = Library()
    except BuildError as error:
        log.warning("native kernels are not used: %s", error)
        return None
    log.info("computing by native kernels for %s", built.instructions)
    return built


class Threads:
    """CPU threads that compute together; the calling one is one of them."""

    def __init__(self, library: Library, count: int) -> None:
        self.library = library
        self.handle = library.make("threads", self, count)
        self._one_caller = threading.RLock()

    def __enter__(self) -> Self:
        """They wait actively from now on: a step begins. Nests; only one thread of Python's is inside at a time."""
        self._one_caller.acquire()
        self.library.run("begin", self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.library.run("end", self.handle)
        self._one_caller.release()


class Packed:
    """y = x Wᵀ + b by a native kernel, each row the same bits whatever the number of rows."""

    handle: int
    out_features: int
    in_features: int

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] fp32."""
        x = x.float().contiguous()
        y = torch.empty(len(x), self.out_features)
        with self._threads as threads:
            threads.library.run("linear", self.handle, x.data_ptr(), len(x), y.data_ptr(), threads.handle)
        return y


class PackedLinear(Packed):
    """Weights in fp32 or bf16 (packed.h); called alone, x is rounded to the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, threads: Threads, *, paired: bool = False) -> None:
        """weight [out_features, in_features] fp32 or bf16, on the CPU; no reference to it is kept. bias [out_features] or None.

        paired: the output's halves, of equal size, are gate and up, whose product the decoder's layers take at once.
        """
        super().__init__(threads)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        weight = weight.contiguous()
        wide = None if bias is None else bias.float().contiguous()
        what = (weight.data_ptr(), _KINDS[weight.dtype], None, None, 0, False)
        sizes = (self.out_features, self.in_features, paired, threads.handle)
        with threads:
            self.handle = threads.library.make("pack", self, *what, address(wide), *sizes)


class PackedQuantized(Packed):
    """Weights in 8 or 4 bits (quantized.h).

    Activations are taken as they come: in fp32, or in a decoder of bf16 rounded to that. With a weight-only scheme they are
    multiplied in fp32; with a dynamic one they are rounded to 8 bits by each row's range, and a group's sum of integers is exact.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, threads: Threads, *, paired: bool = False) -> None:
        """Arguments as of PackedLinear. Raises ConfigError where groups are not of a multiple of 8 inputs, or inputs too many."""
        super().__init__(threads)
        self.out_features, self.in_features = weight.shape
        groups = weight.scale.shape[1]
        if groups > 1 and weight.group_size % _UNIT:
            raise ConfigError(f"groups of {weight.group_size} inputs: the native kernels take multiples of {_UNIT}")
        if self.in_features > _MOST_INPUTS:
            raise ConfigError(f"{self.in_features} inputs: the native kernels take up to {_MOST_INPUTS} of quantized weights")
        scheme = weight.scheme
        values, scale = weight.values.contiguous(), weight.scale.float().contiguous()
        zero = None if weight.zero_point is None else weight.zero_point.contiguous()
        wide = None if bias is None else bias.float().contiguous()
        kind = _KINDS["fp8" if values.dtype == FP8 else f"int{scheme.bits}"]
        what = (values.data_ptr(), kind, scale.data_ptr(), address(zero), groups, scheme.dynamic)
        sizes = (self.out_features, self.in_features, paired, threads.handle)
        with threads:
            self.handle = threads.library.make("pack", self, *what, address(wide), *sizes)


class PackedQuantizedPart(PackedQuantized):
    """Of dynamic activations, the part of a rank that has some features of a token: see TorchQuantizedPart, whose bits it has."""

    def __init__(self, weight: QuantizedWeight, threads: Threads, exchange: Exchange) -> None:
        alone = weight.scale.shape[1] == 1
        self._after = weight.scale.t().contiguous() if alone else None
        super().__init__(replace(weight, scale=torch.ones_like(weight.scale)) if alone else weight, None, threads)
        self._kind, self._ranges = weight.scheme.kind, Ranges(exchange)
        self._failure: Exception | None = None
        self._called = _EXCHANGE(self._exchange)  # C has no other hold on it
        threads.library.run("pack_exchange", self.handle, self._called)

    def finish(self, sums: Tensor) -> Tensor:
        """See parallel.linear.Deferred."""
        if self._failure is not None:
            raise self._failure
        return scaled(sums, self._after, self._ranges.scale(self._kind))

    def _exchange(self, largest: Any, rows: int) -> None:
        """Called by the kernel; it cannot raise through C."""
        here = torch.from_numpy(np.ctypeslib.as_array(largest, (rows,)))
        try:
            here.copy_(self._ranges(here.clone()))
        except Exception as error:
            self._failure = error


def address(of: "Tensor | NDArray[Any] | None") -> int | None:
    """Where the elements are; None for none."""
    if of is None:
        return None
    return of.ctypes.data if isinstance(of, np.ndarray) else of.data_ptr()


__all__ = [
    "DTYPES",
    "KV_DTYPES",
    "Batch",
    "BuildError",
    "Dimensions",
    "Layer",
    "Library",
    "Packed",
    "PackedLinear",
    "PackedQuantized",
    "PackedQuantizedPart",
    "Paged",
    "Threads",
    "address",
    "library",
]
