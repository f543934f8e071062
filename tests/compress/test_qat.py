"""Quantization-aware training on the demo model, a few steps of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.model import DEMO_MODEL, open_model
from cluster.schemes import UNCHANGED, Recipe, Scheme, parse_recipe
from compress.gptq import round_to_nearest
from compress.qat import Tuning, export, linears, simulate, train

PLAN = Tuning(minutes=None, steps=6, batch_tokens=256, micro_tokens=256, context=64, compiled=False)
HALF = torch.bfloat16


class Text:
    """Rows of one fixed random text: to be learnt by heart."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 4096, (4, 65), generator=torch.Generator().manual_seed(0))

    def batch(self, first: int, rows: int, length: int) -> Tensor:
        return self.ids[[(first + row) % 4 for row in range(rows)], :length]


def demo() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model.eval()


def rounded(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    for name, linear in linears(model):
        scheme = recipe.of(name)
        if isinstance(scheme, Scheme):
            linear.weight.data = round_to_nearest(linear.weight.data, scheme, "minmax", HALF).dequantized()
    return model


@torch.inference_mode()
def told(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=Text().ids[:, :64], use_cache=False).logits
    return logits.log_softmax(-1)


def kl(model: PreTrainedModel) -> float:
    return float(nn.functional.kl_div(told(model), told(demo()), log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-dynamic"])
def test_what_is_simulated_is_what_comes_out(scheme: str) -> None:
    recipe = parse_recipe(scheme)
    simulated, plain = demo(), rounded(demo(), recipe)
    assert simulate(simulated, recipe, HALF) == 28
    if "dynamic" not in scheme:
        torch.testing.assert_close(told(simulated), told(plain), atol=1e-4, rtol=0)
    else:
        assert (told(simulated) - told(plain)).abs().max() > 1e-3, "activations are rounded too"


def test_training_takes_back_some_of_what_rounding_loses(tmp_path: Path) -> None:
    recipe, files = parse_recipe("int4-g64"), open_model(str(DEMO_MODEL))
    tuned = train(files, recipe, PLAN, Text())
    export(tuned, files, tmp_path / "tuned")
    assert kl(rounded(tuned, recipe)) < 0.8 * kl(rounded(demo(), recipe))
    written, before = load_file(tmp_path / "tuned" / "model.safetensors"), load_file(DEMO_MODEL / "model.safetensors")
    assert written.keys() == before.keys()
    assert torch.equal(written["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert {str(x.dtype) for name, x in written.items() if name.endswith("_proj.weight")} == {"torch.float32"}
    assert open_model(str(tmp_path / "tuned")).shape == files.shape


def test_the_control_hardly_moves() -> None:
    assert kl(train(open_model(str(DEMO_MODEL)), UNCHANGED, PLAN, Text())) < 1e-3


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe, files = parse_recipe("int4-g64"), open_model(str(DEMO_MODEL))
    whole = train(files, recipe, PLAN, Text())

    class Interrupted(Text):
        def batch(self, first: int, rows: int, length: int) -> Tensor:
            if first >= 3 * 4:
                raise KeyboardInterrupt
            return super().batch(first, rows, length)

    often = Tuning(**{**vars(PLAN), "save_minutes": 0.0})
    with pytest.raises(KeyboardInterrupt):
        train(files, recipe, often, Interrupted(), tmp_path / "checkpoint.pt")
    resumed = train(files, recipe, often, Text(), tmp_path / "checkpoint.pt", resume=True)
    for (name, one), (_, other) in zip(linears(whole), linears(resumed), strict=True):
        assert torch.equal(one.weight, other.weight), name
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_recipe_without_linears_is_refused() -> None:
    with pytest.raises(ValueError, match="quantizes no linear"):
        simulate(demo(), parse_recipe("lm_head: int8"), HALF)
