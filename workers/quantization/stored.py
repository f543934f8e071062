"""Reading linears of few bits from files, as compressed-tensors, AutoGPTQ and AutoAWQ lay them out.

    compressed-tensors   plain    weight [out, in] int8 or fp8, weight_scale [out, groups], weight_zero_point [out, groups] int8
                         packed   weight_packed [out, in / n] int32, weight_scale, weight_zero_point [out / n, groups] int32,
                                  weight_shape [2] int64
    GPTQ                 qweight [in / n, out] int32, qzeros [groups, out / n] int32, scales [groups, out], g_idx [in]
    AWQ                  the same, but qweight [in, out / n], outputs in an order of their own, no g_idx

with n integers in a word (workers/quantization/packing.py), and w = (q - zero) scale. Whatever is cut out is what cutting the
whole gives, to the bit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.quantization_config import StoredLinear, StoredQuantization
from workers.checkpoint import Checkpoint
from workers.quantization.packing import awq_ordered, per_word, unpacked
from workers.quantization.weight import FP8, QuantizedWeight


def read_linear(
    checkpoint: Checkpoint,
    quantization: StoredQuantization,
    name: str,
    outputs: int,
    inputs: int,
    rows: range | None = None,
    columns: range | None = None,
) -> QuantizedWeight:
    """The weight of the linear `name` of `outputs` x `inputs` features, which is quantized; of it these outputs and inputs.

    No more is read than words and groups demand. Raises ConfigError where tensors are missing or odd.
    """
    stored = quantization.of(name)
    assert stored is not None, f"{name} is not quantized"
    scheme, size = stored.scheme, stored.scheme.group_size or inputs
    if inputs % size:
        raise ConfigError(f"{checkpoint.path}: the {inputs} inputs of {name} do not divide into groups of {size}")
    rows = range(outputs) if rows is None else rows
    columns = range(inputs) if columns is None else columns
    groups = range(columns.start // size, -(-columns.stop // size))
    # Of columns that begin or end inside a group all of the group is read, whose scale it is.
    whole = range(groups.start * size, groups.stop * size) if inputs > size else columns
    part = _Part(checkpoint, stored, name, outputs, inputs, rows, whole, groups)
    read = {"plain": _plain, "packed": _packed, "gptq": _gptq, "awq": _awq}[stored.layout](part)
    found = QuantizedWeight(scheme, read.values, read.scale, read.zero_point)
    if columns == whole:
        return found
    cut = found.inside_groups(range(columns.start - whole.start, columns.stop - whole.start))
    return replace(cut, values=cut.values.contiguous())


@dataclass(frozen=True)
class _Part:
    """What of a linear is to be read."""

    checkpoint: Checkpoint
    stored: StoredLinear
    name: str
    outputs: int
    inputs: int
    rows: range
    columns: range
    """A run of whole groups, where there are some."""
    groups: range

    @property
    def num_groups(self) -> int:
        """Of all inputs."""
        return self.inputs // (self.stored.scheme.group_size or self.inputs)

    def has(self, name: str) -> bool:
        return f"{self.name}.{name}" in self.checkpoint

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape_of(f"{self.name}.{name}")

    def take(self, name: str, dtype: torch.dtype, *shape: int, rows: range | None = None, columns: range | None = None) -> Tensor:
        tensor = self.checkpoint.take_stored(f"{self.name}.{name}", *shape, rows=rows, columns=columns)
        if tensor.dtype != dtype:
            raise self.wrong(f"{name} is {_short(tensor.dtype)}, not {_short(dtype)}")
        return tensor

    def take_scale(self, name: str, *shape: int, rows: range | None = None, columns: range | None = None) -> Tensor:
        """fp32"""
        tensor = self.checkpoint.take_stored(f"{self.name}.{name}", *shape, rows=rows, columns=columns)
        if not tensor.dtype.is_floating_point:
            raise self.wrong(f"{name} is {_short(tensor.dtype)}")
        return tensor.float()

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self.checkpoint.path}: {self.name}: {what}")


@dataclass(frozen=True)
class _Read:
    values: Tensor
    """[rows, columns] int8 or fp8"""
    scale: Tensor
    """[rows, groups] fp32"""
    zero_point: Tensor | None
    """[rows, groups] int8"""


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _plain(part: _Part) -> _Read:
    dtype = FP8 if part.stored.scheme.kind == "float" else torch.int8
    values = part.take("weight", dtype, part.outputs, part.inputs, rows=part.rows, columns=part.columns)
    if dtype == FP8 and ((values.view(torch.uint8) & 0x7F) == 0x7F).any():  # kernels would take it for a number
        raise part.wrong("its weights are not all numbers")
    return _Read(values.contiguous(), _scale(part), _zero_point(part))


def _packed(part: _Part) -> _Read:
    bits = part.stored.scheme.bits
    told = part.take("weight_shape", torch.int64, 2).tolist()
    if told != [part.outputs, part.inputs]:
        raise part.wrong(f"weight_shape is {told}, but config.json asks for {[part.outputs, part.inputs]}")
    words, inside = _words(part.columns, bits)
    shape = part.outputs, -(-part.inputs // per_word(bits))
    values = unpacked(part.take("weight_packed", torch.int32, *shape, rows=part.rows, columns=words), bits)
    return _Read(values[:, inside].contiguous(), _scale(part), _zero_point(part))


def _scale(part: _Part) -> Tensor:
    """One for all, for each row, or for each group of a row."""
    shape = part.shape_of("weight_scale")
    if part.stored.scheme.granularity == "tensor":
        return part.take_scale("weight_scale", *(shape if shape in ((), (1, 1)) else (1,))).reshape(1, 1).repeat(len(part.rows), 1)
    if part.stored.scheme.granularity == "channel" and len(shape) == 1:
        return part.take_scale("weight_scale", part.outputs, rows=part.rows)[:, None]
    scale = part.take_scale("weight_scale", part.outputs, part.num_groups, rows=part.rows, columns=part.groups)
    return scale.contiguous()


def _zero_point(part: _Part) -> Tensor | None:
    name, scheme = "weight_zero_point", part.stored.scheme
    if part.has("weight_g_idx"):
        _check_order(part, part.take("weight_g_idx", torch.int32, part.inputs))
    if scheme.symmetric:
        part.checkpoint.ignore(f"{part.name}.{name}")  # zeros that some versions write
        return None
    if scheme.granularity == "tensor":
        shape = part.shape_of(name)
        zero = part.take(name, torch.int8, *(shape if shape in ((), (1, 1)) else (1,)))
        return zero.reshape(1, 1).repeat(len(part.rows), 1)
    if part.stored.layout == "plain":
        return part.take(name, torch.int8, part.outputs, part.num_groups, rows=part.rows, columns=part.groups).contiguous()
    words, inside = _words(part.rows, scheme.bits)
    shape = -(-part.outputs // per_word(scheme.bits)), part.num_groups
    found = part.take(name, torch.int32, *shape, rows=words, columns=part.groups)
    return unpacked(found.t(), scheme.bits)[:, inside].t().contiguous()


# --- GPTQ and AWQ --------------------------------------------------------------------------------------------------


def _gptq(part: _Part) -> _Read:
    bits = part.stored.scheme.bits
    if part.has("g_idx"):
        _check_order(part, part.take("g_idx", torch.int32, part.inputs))
    words, inside = _words(part.columns, bits)
    shape = -(-part.inputs // per_word(bits)), part.outputs
    values = unpacked(part.take("qweight", torch.int32, *shape, rows=words, columns=part.rows).t(), bits)
    if part.has("bias"):
        _forget_zeros(part)
    return _Read(values[:, inside].contiguous(), _scales(part), _zeros(part))


def _awq(part: _Part) -> _Read:
    bits = part.stored.scheme.bits
    words, inside = _words(part.rows, bits)
    shape = part.inputs, -(-part.outputs // per_word(bits))
    found = part.take("qweight", torch.int32, *shape, rows=part.columns, columns=words)
    values = awq_ordered(unpacked(found, bits))[:, inside]
    return _Read(values.t().contiguous(), _scales(part), _zeros(part))


def _scales(part: _Part) -> Tensor:
    return part.take_scale("scales", part.num_groups, part.outputs, rows=part.groups, columns=part.rows).t().contiguous()


def _zeros(part: _Part) -> Tensor | None:
    scheme, layout = part.stored.scheme, part.stored.layout
    words, inside = _words(part.rows, scheme.bits)
    shape = part.num_groups, -(-part.outputs // per_word(scheme.bits))
    zero = unpacked(part.take("qzeros", torch.int32, *shape, rows=part.groups, columns=words), scheme.bits)
    zero = (awq_ordered(zero) if layout == "awq" else zero)[:, inside]
    if part.stored.zero_less_one:  # 0 less one went round to the greatest
        zero = torch.where(zero == scheme.highest, scheme.lowest, zero + 1)
    if not scheme.symmetric:
        return zero.t().contiguous()
    if zero.any():
        raise part.wrong("its zero-points are not in the middle, though the weights are said to be symmetric")
    return None


def _check_order(part: _Part, order: Tensor) -> None:
    """Which group each input [in] is of: multiplied are runs of inputs."""
    size = part.inputs // part.num_groups
    if part.num_groups > 1 and not torch.equal(order, torch.arange(part.inputs, dtype=torch.int32) // size):
        raise part.wrong("its groups are not runs of inputs (act-order, desc_act), which is not served")


def _forget_zeros(part: _Part) -> None:
    """Some files of models without biases have such, of zeros."""
    bias = f"{part.name}.bias"
    if not part.checkpoint.peek(bias).any():
        part.checkpoint.ignore(bias)


def _words(own: range, bits: int) -> tuple[range, slice]:
    """The words that hold integers `own`, and where in them these are."""
    count = per_word(bits)
    words = range(own.start // count, -(-own.stop // count))
    return words, slice(own.start - words.start * count, own.stop - words.start * count)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
