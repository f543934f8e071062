"""Names of precisions and recipes."""

import pytest

from cluster.config import ConfigError
from cluster.schemes import Scheme, parse_precision, parse_recipe

NAMES = [
    "int8",
    "int8-asym",
    "int8-tensor",
    "int8-asym-tensor",
    "int8-g64",
    "int8-dynamic",
    "int4-g128",
    "int4-asym-g32",
    "int4-tensor",
]
NAMES += ["int4-g32-dynamic", "fp8", "fp8-tensor", "fp8-dynamic"]


@pytest.mark.parametrize("name", NAMES)
def test_a_scheme_is_written_as_it_is_read(name: str) -> None:
    assert str(parse_precision(name)) == name


def test_int4_alone_has_groups() -> None:
    assert parse_precision("int4") == Scheme(4, granularity="group", group_size=128)


@pytest.mark.parametrize(
    "name", ["int2", "int8-g0", "fp8-asym", "fp8-g32", "int8-asym-dynamic", "int8-g64-dynamic", "", "INT8", "int8 asym"]
)
def test_what_is_no_precision_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'"):
        parse_precision(name)


def test_bits_count_what_groups_need_besides() -> None:
    schemes = [parse_precision(name) for name in ("int8", "int4-g128", "int4-asym-g32")]
    assert [s.bits_per_weight for s in schemes if isinstance(s, Scheme)] == [8, 4.125, 4.625]


def test_the_first_rule_that_matches_decides() -> None:
    recipe = parse_recipe("lm_head: bf16, layers.0-1: int8, layers.7.mlp: fp8, down_proj: int8-asym, rest: int4-g64")
    expected = {
        "lm_head": "bf16",
        "model.layers.0.mlp.down_proj": "int8",
        "model.layers.1.self_attn.q_proj": "int8",
        "model.layers.10.self_attn.q_proj": "int4-g64",
        "model.layers.7.mlp.down_proj": "fp8",
        "model.layers.7.self_attn.q_proj": "int4-g64",
        "model.layers.2.mlp.down_proj": "int8-asym",
    }
    assert {name: str(recipe.of(name)) for name in expected} == expected
    assert [str(s) for s in recipe.schemes] == ["int8", "fp8", "int8-asym", "int4-g64"]
    assert parse_recipe(str(recipe)) == recipe


def test_a_precision_alone_leaves_the_head() -> None:
    recipe = parse_recipe("int8")
    assert recipe.of("lm_head") is None
    assert str(recipe.of("model.layers.3.mlp.up_proj")) == "int8"
    assert parse_recipe("layers.mlp: int8").of("model.layers.3.self_attn.q_proj") is None


@pytest.mark.parametrize("pattern", ["donw_proj", "layers.4", "layers.3-2.mlp", "layers.mpl"])
def test_a_pattern_that_means_nothing_is_refused(pattern: str) -> None:
    parse_recipe("lm_head: bf16, layers.3: int8, layers.2-9.mlp: fp8, o_proj: int4, rest: int8").check(4)
    with pytest.raises(ConfigError, match=f"'{pattern}' means no linear of a model of 4 layers"):
        parse_recipe(f"{pattern}: int8, rest: int4").check(4)


@pytest.mark.parametrize("text", ["lm_head bf16: x", "layers.1-: int8", "rest: int3", "rest", "a: int8,", "layers.x-2: int8"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_recipe(text)
