"""What is read from a config.json: defaults as in transformers, refusals that name what is wrong."""

from typing import Any

import pytest
from transformers import AutoConfig

from cluster.config import ConfigError
from cluster.shape import LinearScaling, Llama3Scaling, YarnScaling, parse_shape

SIZES = {
    "vocab_size": 173,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1000,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"architectures": [f"{MODEL_TYPES[family]}ForCausalLM"], **SIZES, **changes}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_is_missing_is_as_in_transformers(family: str) -> None:
    """A config.json with few sizes: transformers' classes say what the rest is."""
    few = {**SIZES, "num_attention_heads": 32, "hidden_size": 128}
    del few["num_key_value_heads"], few["max_position_embeddings"]
    theirs = AutoConfig.for_model(family, **few)
    ours = parse_shape({"architectures": config(family)["architectures"], **few}, "m")
    assert (ours.num_kv_heads, ours.max_position_embeddings) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert set(ours.windows) == {getattr(theirs, "sliding_window", None)}
    assert ours.rope_scaling is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ],
)
def test_windows_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(family, **SIZES, **changes)
    wanted = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert parse_shape(config(family, **changes), "m").windows == wanted


def test_mistral_with_types_of_layers_has_windows_where_they_say() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    theirs = AutoConfig.for_model("ministral", **SIZES, sliding_window=8, layer_types=kinds)
    shape = parse_shape(config("mistral", sliding_window=8, layer_types=theirs.layer_types), "m")
    assert shape.windows == (None, 8, None)


def test_biases_are_where_the_family_has_them() -> None:
    def biases(family: str, **changes: Any) -> tuple[bool, bool, bool]:
        shape = parse_shape(config(family, **changes), "m")
        return shape.qkv_bias, shape.output_bias, shape.mlp_bias

    assert biases("llama") == (False, False, False)
    assert biases("llama", attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases("mistral") == (False, False, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3", attention_bias=True) == (True, True, False)


def test_rope_scaling_is_read_in_its_old_and_new_place() -> None:
    old = parse_shape(config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.5}), "m")
    new = parse_shape(config(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}), "m")
    assert old == new
    assert (old.rope_scaling, old.rope_theta, old.max_position_embeddings) == (LinearScaling(2.5), 5e5, 2500)


def test_yarn_reaches_as_far_as_its_factor() -> None:
    shape = parse_shape(config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}), "m")
    assert shape.rope_scaling == YarnScaling(4.0, 500, 32.0, 1.0, True, None, None, None)
    assert shape.max_position_embeddings == 2000
    plain = parse_shape(config(rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 250}), "m")
    assert isinstance(plain.rope_scaling, YarnScaling)
    assert (plain.rope_scaling.factor, plain.max_position_embeddings) == (4.0, 1000)


def test_llama3_scaling_reaches_as_far_as_it_says() -> None:
    shape = parse_shape(config(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 125}), "m")
    assert shape.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 125)
    assert shape.max_position_embeddings == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unsupported architecture GPT2LMHeadModel; known: LlamaForCausalLM"),
        ({"architectures": None}, r"unsupported architecture \(none named\)"),
        ({"num_attention_heads": None}, "has a value that can't be used"),
        ({"num_key_value_heads": 3}, "4 heads don't divide into 3"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"vocab_size": 0}, "a size below 1"),
        ({"max_position_embeddings": 0}, "a size below 1"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope scaling 'longrope' is not supported, only linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope scaling makes no sense: LinearScaling"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope scaling makes no sense: Llama3Scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}}, "rope scaling makes no sense: YarnScaling"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling makes no sense: YarnScaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by type of layer"),
        ({"rope_scaling": [1]}, "has a value that can't be used"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"m: .*{message}"):
        parse_shape(config(**changes), "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "a size below 1"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types must name .* each of 3 layers"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}, "layer_types must name"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    family = "qwen3" if "layer_types" in changes else "mistral"
    with pytest.raises(ConfigError, match=message):
        parse_shape(config(family, **changes), "m")


def test_a_missing_size_is_named() -> None:
    broken = config()
    del broken["hidden_size"]
    with pytest.raises(ConfigError, match="lacks 'hidden_size'"):
        parse_shape(broken, "m")
