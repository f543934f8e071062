"""Quantized models: what transformers says of the expanded weights, whatever the model is divided into and whatever proposes."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.config import ConfigError
from cluster.model import DEMO_MODEL
from cluster.offline import LLM, Completion
from cluster.schemes import Recipe, Scheme, parse_recipe
from tests.workers.driver import Driver, generate, greedy
from tests.workers.models import MAX_LEN, TinyModel, make_model, prompt
from tests.workers.models import VOCAB as TINY_VOCAB
from tests.workers.test_speculative import VOCAB, check, requests
from workers.quantization.activations import requantized
from workers.quantization.weight import quantize

KINDS = ["llama3-rope-tied", "llama-biases", "mistral", "qwen2", "qwen3-tied-bias", "qwen3"]
MIXED = "lm_head: int8, layers.0.mlp: int8-asym, layers.0.q_proj: int4-tensor, rest: int4-asym"
RECIPES = ["int8", "int4-tensor", "fp8", MIXED]


def expanded(model: TinyModel, recipe: Recipe) -> Any:
    """transformers' model with weights, and activations where they are dynamic, as quantization leaves them."""
    oracle = copy.deepcopy(model.oracle)
    if oracle.config.tie_word_embeddings:
        oracle.lm_head.weight = nn.Parameter(oracle.lm_head.weight.clone())
    for name, part in oracle.named_modules():
        scheme = recipe.of(name) if isinstance(part, nn.Linear) else None
        if not isinstance(scheme, Scheme):
            continue
        part.weight.data = quantize(part.weight.data, scheme).dequantized()
        if scheme.dynamic:
            part.register_forward_pre_hook(_requantize)
    return oracle


def _requantize(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return requantized(inputs[0].flatten(0, -2), "int").view_as(inputs[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    root: Path = tmp_path_factory.mktemp("quantized")
    return {kind: make_model(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_model_is_that_of_the_expanded_weights(models: dict[str, TinyModel], recipe: str, kernels: str) -> None:
    for model in models.values():
        words = _fitting(recipe, model)
        oracle = TinyModel(model.path, expanded(model, parse_recipe(words)))
        runner = model.runner(quantization=words, kernels=kernels)
        assert generate(runner, prompt(21), 12, greedy()) == oracle.oracle_greedy(prompt(21), 12)
        assert generate(runner, prompt(21), 12, greedy(), chunk=5) == oracle.oracle_greedy(prompt(21), 12)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_dynamic_activations_are_near_those_of_the_oracle(models: dict[str, TinyModel], kernels: str) -> None:
    """What differs in the last bit may be rounded to another of the 255 values, so equal tokens are not to be had."""
    for model in models.values():
        oracle = TinyModel(model.path, expanded(model, parse_recipe("int8-dynamic")))
        driver = Driver(model.runner(quantization="int8-dynamic", kernels=kernels))
        driver.add(0, prompt(30), greedy(logprobs=TINY_VOCAB))
        driver.run([0], 6, chunk=11)
        sequence = driver.sequences[0]
        told = torch.zeros(6, TINY_VOCAB)
        for row, entry in zip(told, sequence.logprobs, strict=True):
            row[entry.top_ids] = torch.tensor(entry.top_logprobs).exp()
        ids = [*sequence.prompt, *sequence.output]
        wanted, exact = (some.oracle_logits(ids)[29:-1].softmax(-1) for some in (oracle, model))
        ours, usual = ((told - one).abs().sum(-1).mean() / 2 for one in (wanted, exact))
        assert ours < 0.02
        assert ours < usual / 2


def _fitting(recipe: str, model: TinyModel) -> str:
    """int4-asym in groups that divide all inputs of a tiny model."""
    size = 8 if all(n % 8 == 0 for n in _inputs(model)) else 2
    return recipe.replace("int4-asym", f"int4-asym-g{size}")


def _inputs(model: TinyModel) -> set[int]:
    return {part.in_features for part in model.oracle.modules() if isinstance(part, nn.Linear)}


# --- whole engines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads for four ranks, layers for two stages, and the demo's tokenizer."""
    made = make_model(tmp_path_factory.mktemp("quantized-engine") / "m", "qwen3", vocab_size=VOCAB)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, made.path)
    return made.path


def answers(path: Path, count: int = 30, **settings: Any) -> list[Completion]:
    usual: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_memory": "2MiB", "max_model_len": MAX_LEN}
    prompts, params = requests(count, 11)
    with LLM(str(path), **usual | settings) as llm:
        found = llm.generate(prompts, params, ignore_eos=True)
        if settings.get("speculative"):
            assert llm.batcher.counters.proposed > llm.batcher.counters.accepted > 0
            check(llm.generate(prompts, params, ignore_eos=True), found)  # out of the prefix cache
    return found


GRIDS = [{"tp": 2}, {"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 2}]


ENGINES = ["int8", "int4-asym-g8", "int8-dynamic", "lm_head: int8, layers.1: int8-tensor, rest: int8-asym"]


@pytest.mark.parametrize("recipe", ENGINES)
def test_divided_it_says_the_same(path: Path, recipe: str) -> None:
    whole = answers(path, quantization=recipe)
    for grid in GRIDS:
        check(answers(path, quantization=recipe, **grid), whole)


@pytest.mark.parametrize("grid", [{}, *GRIDS])
def test_a_quantized_draft_changes_no_token_of_a_quantized_target(path: Path, grid: dict[str, int]) -> None:
    wanted = answers(path, quantization="int4-asym-g8")
    draft: dict[str, Any] = {"speculative": "draft", "draft_model": str(path), "draft_quantization": "int8"}
    check(answers(path, quantization="int4-asym-g8", **draft, **grid), wanted)


def test_what_cannot_be_quantized_so_is_said(path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.layers.0.self_attn.q_proj cannot be quantized as int4-g128: 48 inputs do not divide"
    ):
        answers(path, quantization="int4")
    with pytest.raises(ConfigError, match="'int5' is no precision"):
        answers(path, quantization="int5")
    with pytest.raises(ConfigError, match="draft_quantization is for a draft_model"):
        answers(path, draft_quantization="int8")


def test_parts_of_different_precision_are_expanded(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = "q_proj: int8, layers: int8-asym"
    assert answers(path, 6, quantization=mixed)
    assert "self_attn.q_proj+k_proj+v_proj is not kept quantized: its parts differ in precision" in caplog.text


def test_casts_round_once(models: dict[str, TinyModel]) -> None:
    model = models["qwen3"]
    oracle = copy.deepcopy(model.oracle)
    for _, part in oracle.named_modules():
        if isinstance(part, nn.Linear):
            part.weight.data = _rounded(part.weight.data)
    runner = model.runner(quantization="rest: bf16")
    assert generate(runner, prompt(9), 8, greedy()) == TinyModel(model.path, oracle).oracle_greedy(prompt(9), 8)


def _rounded(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()


def test_a_head_in_groups_too_small_for_the_kernels_is_expanded(models: dict[str, TinyModel]) -> None:
    for kind in ("qwen3", "qwen3-tied-bias"):
        model, words = models[kind], "lm_head: int4-g4"
        oracle = TinyModel(model.path, expanded(model, parse_recipe(words)))
        assert generate(model.runner(quantization=words), prompt(21), 8, greedy()) == oracle.oracle_greedy(prompt(21), 8)


def test_what_means_no_linear_is_refused(models: dict[str, TinyModel]) -> None:
    with pytest.raises(ConfigError, match="'donw_proj' means no linear"):
        models["qwen3"].runner(quantization="donw_proj: int8, rest: int4")
