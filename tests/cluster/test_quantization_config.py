"""What config.json says of quantized checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from cluster.model import DEMO_MODEL, open_model
from cluster.quantization_config import StoredLinear, StoredQuantization, parse_quantization
from cluster.schemes import Scheme, parse_precision

DOWN, HEAD = "model.layers.3.mlp.down_proj", "lm_head"


def compressed(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    numbered = {f"group_{number}": {"targets": ["Linear"], **group} for number, group in enumerate(groups)}
    told = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": numbered, "ignore": ["lm_head"]}
    return {"quantization_config": told | changes}


def weights(bits: int = 4, **changes: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | changes


W8A8 = "int-quantized"
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FLOAT = {"type": "float"}
CHANNEL = {"strategy": "channel", "group_size": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def scheme(name: str) -> Scheme:
    found = parse_precision(name)
    assert isinstance(found, Scheme)
    return found


def parsed(config: dict[str, Any]) -> StoredQuantization:
    found = parse_quantization(config, "there")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "name", "layout"),
    [
        (compressed({"weights": weights()}), "int4-g128", "packed"),
        (compressed({"weights": weights(strategy=None, group_size=32, symmetric=False)}), "int4-asym-g32", "packed"),
        (
            compressed({"weights": weights(8, **CHANNEL), "input_activations": TOKEN}, format="int-quantized"),
            "int8-dynamic",
            "plain",
        ),
        (compressed({"weights": weights(8, strategy="tensor", group_size=None)}, format="naive-quantized"), "int8-tensor", "plain"),
        (
            compressed({"weights": weights(8, **FLOAT, **CHANNEL), "input_activations": TOKEN | FLOAT}, format="float-quantized"),
            "fp8-dynamic",
            "plain",
        ),
        (compressed({"weights": weights(), "format": "pack-quantized"}, format="mixed-precision"), "int4-g128", "packed"),
        (compressed({"weights": weights(actorder="weight")}), "int4-g128", "packed"),
        ({"quantization_config": GPTQ}, "int4-g128", "gptq"),
        ({"quantization_config": GPTQ | {"bits": 8, "group_size": -1, "sym": False}}, "int8-asym", "gptq"),
        ({"quantization_config": AWQ}, "int4-asym-g64", "awq"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 32}}, "int4-asym-g32", "awq"),
    ],
)
def test_the_scheme_of_a_linear(config: dict[str, Any], name: str, layout: str) -> None:
    stored = parsed(config).of(DOWN)
    assert stored is not None
    assert (str(stored.scheme), stored.layout) == (name, layout)
    assert parsed(config).scheme_of(HEAD) is None


def test_nothing_said_is_nothing_quantized() -> None:
    assert parse_quantization({}, "there") is None
    assert open_model(str(DEMO_MODEL)).quantization is None


def test_a_name_decides_before_an_expression_and_that_before_a_class() -> None:
    found = parsed(
        compressed(
            {"weights": weights()},
            {"weights": weights(group_size=32), "targets": ["re:.*down_proj$", "model.layers.1.mlp.up_proj"]},
            {"weights": weights(group_size=64), "targets": [DOWN, "re:.*up_proj"]},
            {"targets": ["re:.*k_proj"]},
            ignore=["re:.*\\.7\\..*", "model.layers.2.mlp.up_proj"],
        )
    )
    names = {
        DOWN: "int4-g64",
        "model.layers.4.mlp.down_proj": "int4-g32",
        "model.layers.1.mlp.up_proj": "int4-g32",
        "model.layers.4.mlp.up_proj": "int4-g64",
        "model.layers.2.mlp.up_proj": "None",
        "model.layers.7.mlp.down_proj": "None",
        "model.layers.0.self_attn.k_proj": "None",
        "model.layers.0.self_attn.q_proj": "int4-g128",
        HEAD: "int4-g128",
    }
    assert {name: str(found.scheme_of(name)) for name in names} == names


def test_gptq_names_what_it_leaves_and_what_differs() -> None:
    dynamic = {"-:.*q_proj": {}, "+:.*\\.3\\.mlp.*": {"bits": 8, "group_size": 64}}
    found = parsed({"quantization_config": GPTQ | {"dynamic": dynamic, "lm_head": True, "checkpoint_format": "gptq_v2"}})
    assert found.of("model.layers.3.self_attn.q_proj") is None
    assert found.of(DOWN) == StoredLinear(scheme("int8-g64"), "gptq")
    assert found.of(HEAD) == StoredLinear(scheme("int4-g128"), "gptq")
    assert parsed({"quantization_config": GPTQ}).of(DOWN) == StoredLinear(scheme("int4-g128"), "gptq", zero_less_one=True)
    some = parsed({"quantization_config": GPTQ | {"modules_in_block_to_quantize": [["mlp.down_proj"], ["self_attn.q_proj"]]}})
    assert some.scheme_of(DOWN) is not None
    assert some.scheme_of("model.layers.3.mlp.up_proj") is None


def test_awq_leaves_modules_by_part_of_their_name() -> None:
    found = parsed({"quantization_config": AWQ | {"modules_to_not_convert": ["layers.0.", "down_proj"]}})
    assert found.scheme_of(DOWN) is None
    assert found.scheme_of("model.layers.0.mlp.up_proj") is None
    assert found.scheme_of("model.layers.10.mlp.up_proj") is not None


STATIC = TOKEN | {"dynamic": False, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed({"weights": weights(), "input_activations": STATIC}), "scales of calibration"),
        (compressed({"weights": weights(), "input_activations": TOKEN | {"num_bits": 4}}), "activations of 4 bits"),
        (compressed({"weights": weights(8), "input_activations": TOKEN}), "int8 in groups"),
        (compressed({"weights": None, "input_activations": TOKEN}), "no weights"),
        (compressed({"weights": weights(), "output_activations": TOKEN}), "outputs of linears"),
        (compressed({"weights": weights(2)}), "weights of 2 bits"),
        (compressed({"weights": weights(4, type="float")}), r"weights of 4 bits \(float\)"),
        (compressed({"weights": weights(8, type="float")}), "fp8 weights"),
        (compressed({"weights": weights(8, strategy="block")}), "a scale for each block"),
        (compressed({"weights": weights(actorder="group")}), "actorder"),
        (compressed({"weights": weights(group_size=0)}), "group_size 0"),
        (compressed({"weights": weights()}, format="marlin-24"), "format marlin-24"),
        (compressed({"weights": weights()}, kv_cache_scheme=TOKEN), "KV cache"),
        (compressed({"weights": weights()}, sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (compressed({"weights": weights()}, transform_config={"config_groups": {"a": 1}}), "rotated weights"),
        (compressed({"weights": weights(), "targets": ["re:("]}), "can't be used"),
        (compressed({"weights": weights(), "targets": "Linear"}), "no list of names"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "lacks 'config_groups'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "method bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "method of no name"),
        ({"quantization_config": [4]}, "can't be used"),
        ({"quantization_config": GPTQ | {"bits": 2}}, "weights of 2 bits"),
        ({"quantization_config": GPTQ | {"group_size": 0}}, "group_size 0"),
        ({"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}, "format marlin"),
        ({"quantization_config": {"quant_method": "gptq"}}, "lacks 'bits'"),
        ({"quantization_config": AWQ | {"version": "gemv"}}, "format gemv"),
        ({"quantization_config": AWQ | {"zero_point": False}}, "without zero-points"),
        ({"quantization_config": AWQ | {"bits": 3}}, "AWQ of 3 bits"),
    ],
)
def test_what_is_not_served_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_quantization(config, "there")
    assert str(raised.value).startswith("there: quantization")


def test_open_model_tells_of_it(tmp_path: Path) -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": AWQ}))
    quantization = open_model(str(tmp_path), weights=False).quantization
    assert quantization is not None
    assert quantization.method == "awq"


def test_expressions_that_are_none_are_refused() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    for changes in ({"ignore": ["re:("]}, {"config_groups": {"group_0": group | {"targets": ["re:("]}}}):
        found = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | changes
        with pytest.raises(ConfigError, match=r"a value that can't be used: missing \)"):
            parse_quantization({"quantization_config": found}, "here")
