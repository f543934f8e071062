"""Linears of few bits in files: what is written is read again, by us and by others, and what others write is read here."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.config import ConfigError
from cluster.quantization_config import StoredQuantization, parse_quantization
from cluster.schemes import Scheme, parse_precision
from tests.workers.models import VOCAB, make_model, prompt
from workers.checkpoint import Checkpoint
from workers.quantization.packing import packed, unpacked
from workers.quantization.stored import read_linear
from workers.quantization.weight import QuantizedWeight, quantize
from workers.quantization.written import config_of, tensors_of

NAME = "model.layers.0.mlp.down_proj"
OUT, IN = 24, 96
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 2, OUT)[:, None]
SCHEMES = ["int8", "int8-asym", "int8-tensor", "int8-asym-tensor", "int8-g16", "int8-dynamic"]
SCHEMES += ["int4-g32", "int4-asym-g32", "int4-asym-g12", "int4-tensor", "int4-g48-dynamic", "fp8", "fp8-tensor", "fp8-dynamic"]
ROWS = [None, range(8), range(8, 24), range(3, 17), range(23, 24)]
COLUMNS = [None, range(48), range(48, 96), range(32, 64), range(16, 80), range(20, 28), range(5, 31)]


def scheme(name: str) -> Scheme:
    found = parse_precision(name)
    assert isinstance(found, Scheme)
    return found


def opened(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[Checkpoint, StoredQuantization]:
    save_file(tensors, folder / "model.safetensors")
    quantization = parse_quantization({"quantization_config": config}, "there")
    assert quantization is not None
    return Checkpoint(folder), quantization


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.scheme == expected.scheme
    assert torch.equal(found.values.view(torch.int8), expected.values.view(torch.int8))
    assert found.values.is_contiguous()
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero_point is None) == (expected.zero_point is None)
    if found.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(found.zero_point, expected.zero_point)


def assert_parts(checkpoint: Checkpoint, quantization: StoredQuantization, whole: QuantizedWeight) -> None:
    """All cuts are those of the whole, and nothing is left over."""
    outputs, inputs = whole.shape
    for rows in ROWS:
        for columns in COLUMNS:
            found = read_linear(checkpoint, quantization, NAME, outputs, inputs, rows, columns)
            cut = whole if rows is None else whole.rows(rows)
            assert_same(found, cut if columns is None else cut.columns(columns))
    checkpoint.finish()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_bits_in_words(bits: int) -> None:
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, 24), dtype=torch.int8)
    words = packed(values, bits)
    assert words.dtype == torch.int32
    for row, column in ((0, 0), (2, 3), (4, 23)):
        word, place = divmod(column, 32 // bits)
        bare = (int(words[row, word]) >> (place * bits)) & ((1 << bits) - 1)
        assert bare - (1 << bits - 1) == int(values[row, column])
    assert torch.equal(unpacked(words, bits), values)
    assert packed(values[:, :9], 4).shape == (5, 2)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_read_again_and_cuts_are_those_of_the_whole(tmp_path: Path, name: str) -> None:
    weight = quantize(WEIGHT, scheme(name))
    config = json.loads(json.dumps(config_of({NAME: weight.scheme, "lm_head": None})))
    checkpoint, quantization = opened(tmp_path, tensors_of(NAME, weight), config)
    assert quantization.scheme_of("lm_head") is None
    assert_parts(checkpoint, quantization, weight)


def test_scales_are_written_in_fewer_bits_only_if_nothing_is_lost() -> None:
    weight = quantize(WEIGHT, scheme("int4-g32"))
    with pytest.raises(ValueError, match=r"the scales of .*down_proj are not bfloat16"):
        tensors_of(NAME, weight, torch.bfloat16)
    scale = weight.scale.bfloat16().float()
    tensors = tensors_of(NAME, QuantizedWeight(weight.scheme, weight.values, scale), torch.bfloat16)
    assert tensors[f"{NAME}.weight_scale"].dtype == torch.bfloat16
    assert sum(t.nbytes for t in tensors.values()) == OUT * IN // 2 + OUT * IN // 32 * 2 + 16


def test_several_schemes_name_their_linears() -> None:
    schemes = {"a": scheme("int4-g32"), "b": None, "c": scheme("int8-dynamic"), "d": scheme("int4-g32")}
    config = config_of(schemes)
    assert config["format"] == "mixed-precision"
    quantization = parse_quantization({"quantization_config": config}, "there")
    assert quantization is not None
    assert {name: quantization.scheme_of(name) for name in schemes} == schemes


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-asym-g32", "int8-asym", "int8-dynamic", "fp8-dynamic", "int4-tensor"])
def test_what_compressed_tensors_writes_is_read_here(tmp_path: Path, name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = quantize(WEIGHT, scheme(name))
    config = QuantizationConfig(**config_of({NAME: weight.scheme, "lm_head": None}))
    (group,) = config.config_groups.values()
    per_tensor = weight.scheme.granularity == "tensor"
    given = {"weight": WEIGHT, "weight_scale": weight.scale[0] if per_tensor else weight.scale}
    if weight.zero_point is not None:
        given["weight_zero_point"] = weight.zero_point
    written = BaseCompressor.get_value_from_registry(str(config.format)).compress(given, group)
    tensors = {f"{NAME}.{own}": tensor.contiguous() for own, tensor in written.items()}
    checkpoint, quantization = opened(tmp_path, tensors, json.loads(config.model_dump_json()))
    assert_parts(checkpoint, quantization, weight)


# --- packers of GPTQ and AWQ, from their descriptions, a number at a time -----------------------------------------


def words_of(unsigned: NDArray[np.int64], bits: int, order: tuple[int, ...]) -> Tensor:
    """[rows, n] -> [rows, n * bits / 32]: integer order[i] of each word's is at bit i * bits."""
    count = 32 // bits
    words = np.zeros((unsigned.shape[0], unsigned.shape[1] // count), dtype=np.uint32)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for place, which in enumerate(order):
                words[row, word] |= np.uint32(int(unsigned[row, word * count + which]) << (place * bits))
    return torch.from_numpy(words.view(np.int32))


def unsigned(signed: Tensor, bits: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = signed.long().numpy() + (1 << (bits - 1))
    return found


def gptq(weight: QuantizedWeight, less_one: bool, **more: Tensor) -> dict[str, Tensor]:
    bits, order = weight.scheme.bits, tuple(range(32 // weight.scheme.bits))
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    zeros = (unsigned(zero.t(), bits) - less_one) % (1 << bits)
    return {
        f"{NAME}.qweight": words_of(unsigned(weight.values, bits), bits, order).t().contiguous(),
        f"{NAME}.qzeros": words_of(zeros, bits, order),
        f"{NAME}.scales": weight.scale.t().contiguous(),
        f"{NAME}.g_idx": torch.arange(IN, dtype=torch.int32) // weight.group_size,
    } | {f"{NAME}.{name}": tensor for name, tensor in more.items()}


def gptq_config(scheme: Scheme, **changes: Any) -> dict[str, Any]:
    size = scheme.group_size or -1
    return {"quant_method": "gptq", "bits": scheme.bits, "group_size": size, "sym": scheme.symmetric, "desc_act": False} | changes


@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("name", ["int4-g32", "int4-asym-g32", "int8", "int8-asym", "int8-asym-g48"])
def test_gptq_is_read(tmp_path: Path, name: str, written: str) -> None:
    weight = quantize(WEIGHT.abs() if name == "int4-asym-g32" else WEIGHT, scheme(name))
    tensors = gptq(weight, written == "gptq", bias=torch.zeros(OUT))
    checkpoint, quantization = opened(tmp_path, tensors, gptq_config(weight.scheme, checkpoint_format=written))
    assert_parts(checkpoint, quantization, weight)


def test_a_bias_that_gptq_wrote_for_a_purpose_is_not_forgotten(tmp_path: Path) -> None:
    weight = quantize(WEIGHT, scheme("int4-g32"))
    checkpoint, quantization = opened(tmp_path, gptq(weight, True, bias=torch.ones(OUT)), gptq_config(weight.scheme))
    read_linear(checkpoint, quantization, NAME, OUT, IN)
    with pytest.raises(ConfigError, match="down_proj"):
        checkpoint.finish()


@pytest.mark.parametrize("name", ["int4-asym-g32", "int4-asym-g12"])
def test_awq_is_read(tmp_path: Path, name: str) -> None:
    weight = quantize(WEIGHT, scheme(name))
    assert weight.zero_point is not None
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{NAME}.qweight": words_of(unsigned(weight.values.t(), 4), 4, order),
        f"{NAME}.qzeros": words_of(unsigned(weight.zero_point.t(), 4), 4, order),
        f"{NAME}.scales": weight.scale.half().t().contiguous(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": weight.scheme.group_size, "zero_point": True, "version": "gemm"}
    checkpoint, quantization = opened(tmp_path, tensors, config)
    assert_parts(
        checkpoint, quantization, QuantizedWeight(weight.scheme, weight.values, weight.scale.half().float(), weight.zero_point)
    )


def ordered(weight: QuantizedWeight, order: Tensor) -> dict[str, Tensor]:
    return gptq(weight, True) | {f"{NAME}.g_idx": order.to(torch.int32)}


GROUPED = quantize(WEIGHT, scheme("int4-g32"))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"g_idx": torch.arange(IN - 1, -1, -1, dtype=torch.int32) // 32}, {"desc_act": True}, "act-order, desc_act"),
        ({}, {"checkpoint_format": "gptq_v2"}, "zero-points are not in the middle"),
        ({}, {"group_size": 64}, "96 inputs of .*down_proj do not divide into groups of 64"),
        ({"qweight": torch.zeros(11, OUT, dtype=torch.int32)}, {}, r"qweight has shape \[11, 24\].*\[12, 24\]"),
        ({"qweight": torch.zeros(12, OUT)}, {}, "qweight is float32, not int32"),
        ({"scales": torch.zeros(3, OUT, dtype=torch.int32)}, {}, "scales is int32"),
        ({"qzeros": None}, {}, "lacks the tensor .*qzeros"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, changes: dict[str, Tensor | None], config: dict[str, Any], message: str) -> None:
    tensors = gptq(GROUPED, True) | {f"{NAME}.{name}": tensor for name, tensor in changes.items()}
    checkpoint, quantization = opened(
        tmp_path, {name: t for name, t in tensors.items() if t is not None}, gptq_config(GROUPED.scheme, **config)
    )
    with pytest.raises(ConfigError, match=message) as raised:
        read_linear(checkpoint, quantization, NAME, OUT, IN)
    assert "\n" not in str(raised.value)


def test_fp8_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(NAME, quantize(WEIGHT, scheme("fp8")))
    tensors[f"{NAME}.weight"].view(torch.uint8)[3, 5] = 0xFF
    checkpoint, quantization = opened(tmp_path, tensors, config_of({NAME: scheme("fp8")}))
    with pytest.raises(ConfigError, match="its weights are not all numbers"):
        read_linear(checkpoint, quantization, NAME, OUT, IN)


def test_a_shape_that_config_json_does_not_know_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(NAME, GROUPED) | {f"{NAME}.weight_shape": torch.tensor([OUT, IN - 1])}
    checkpoint, quantization = opened(tmp_path, tensors, config_of({NAME: GROUPED.scheme}))
    with pytest.raises(ConfigError, match=r"weight_shape is \[24, 95\]"):
        read_linear(checkpoint, quantization, NAME, OUT, IN)


def test_fewer_bytes_are_read_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, quantization = opened(tmp_path, tensors_of(NAME, GROUPED), config_of({NAME: GROUPED.scheme}))
    read: list[int] = []
    peek = Checkpoint.peek

    def counted(self: Checkpoint, name: str, **cut: Any) -> Tensor:
        tensor = peek(self, name, **cut)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Checkpoint, "peek", counted)
    read_linear(checkpoint, quantization, NAME, OUT, IN)
    whole = sum(read) - 16
    read.clear()
    read_linear(checkpoint, quantization, NAME, OUT, IN, rows=range(8, 16), columns=range(32, 64))
    assert sum(read) - 16 == whole // 9


# --- whole models, in transformers ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8", "int4-asym-g4", "fp8"])
def test_transformers_computes_what_we_wrote(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = make_model(tmp_path / "model", "llama")
    tensors = load_file(model.path / "model.safetensors")
    names = [own.removesuffix(".weight") for own in tensors if own.endswith("_proj.weight")]
    written, rounded = dict(tensors), dict(tensors)
    for own in names:
        weight = quantize(written.pop(f"{own}.weight"), scheme(name))
        written |= tensors_of(own, weight)
        rounded[f"{own}.weight"] = weight.dequantized()
    shutil.copytree(model.path, tmp_path / "quantized")
    save_file(written, tmp_path / "quantized" / "model.safetensors", {"format": "pt"})
    config = json.loads((model.path / "config.json").read_text())
    config["quantization_config"] = config_of({**dict.fromkeys(names, scheme(name)), "lm_head": None})
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    # Left packed, zero-points in words are of another shape than transformers 5.23 expects.
    unpack = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "asym" in name else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.float32, attn_implementation="eager", **unpack
    )
    theirs = loaded.eval()
    model.oracle.load_state_dict(rounded)
    ids = prompt(20)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
    assert logits.shape == (20, VOCAB)
    torch.testing.assert_close(logits, model.oracle_logits(ids), rtol=1e-4, atol=1e-4)
