"""Post-training quantization: GPTQ against its definition and against rounding, whole models, interruptions, refusals."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from cluster.cli import cli
from cluster.config import ConfigError
from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.schemes import UNCHANGED, Scheme, parse_precision, parse_recipe
from compress import parts, posttraining, quantize
from compress.calibration import rows_of
from compress.distill import read_text
from compress.evaluate import evaluate, size_of
from compress.gptq import Hessian, gptq, inverse_factor, round_to_nearest
from compress.layers import LayerRun, Weights, all_linears, num_parameters
from compress.posttraining import make
from compress.qat import Tuning
from compress.quantize import Plan
from tests import threads
from tests.workers.models import KINDS, VOCAB, TinyModel, make_model, prompt
from workers.checkpoint import Checkpoint
from workers.decoder import rms_norm
from workers.quantization.weight import quantize as quantized

one_thread = pytest.fixture(scope="module", autouse=True)(threads.one_thread)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Of four layers, untied, in bf16."""
    return make_model(tmp_path_factory.mktemp("quantize") / "model", "qwen3", torch.bfloat16, layers=4)


ROWS = torch.tensor([prompt(24, seed) for seed in range(12)])


def plan(text: str, **changes: Any) -> Plan:
    return Plan(parse_recipe(text), **({"ranging": "minmax"} | changes))


def scheme(name: str) -> Scheme:
    found = parse_precision(name)
    assert isinstance(found, Scheme)
    return found


def contents(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.peek(name) for name in checkpoint._where}


# --- the algorithm -------------------------------------------------------------------------------------------------


def correlated(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return mixed + 4 * torch.randn(rows, 1, generator=generator)


def by_definition(weight: Tensor, inputs: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """Optimal brain surgeon, an input at a time, with the inverse of what is left: no factor, no blocks. fp64."""
    size = scheme.group_size or weight.shape[1]
    hessian = inputs.double().t() @ inputs.double()
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)))
    left, done = weight.double().clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if j % size == 0:
            group = left[:, j : j + size].float()
            plain = round_to_nearest(group, Scheme(scheme.bits, symmetric=scheme.symmetric), "minmax", torch.float32)
            zero = torch.zeros(len(weight)) if plain.zero_point is None else plain.zero_point[:, 0].float()
            scale = plain.scale[:, 0]
        placed = (torch.round(left[:, j].float() / scale) + zero).clamp(scheme.lowest, scheme.highest)
        done[:, j] = (placed - zero) * scale
        lost = (left[:, j] - done[:, j]) / inverse[j, j]
        left[:, j:] -= lost[:, None] * inverse[j, j:]
        inverse -= inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return done


@pytest.mark.parametrize("name", ["int4-g16", "int4-asym-g32", "int8", "int4-g160"])
def test_gptq_is_what_its_paper_says(name: str) -> None:
    inputs = correlated(400, 160)
    weight = torch.randn(12, 160, generator=torch.Generator().manual_seed(1))
    hessian = Hessian(160)
    for part in torch.split(inputs, 130):
        hessian.add(part)
    found = gptq(weight, hessian, scheme(name), "minmax", torch.float32, damping=0.1).dequantized()
    expected = by_definition(weight, inputs, scheme(name), 0.1)
    same = torch.isclose(found, expected, rtol=1e-3, atol=1e-3)
    # The greatest of a symmetric group is at 7.5 steps, halfway: where it comes first, sums in fp32 decide on the rest of its row.
    assert same.all(dim=1).sum() >= 10


@pytest.mark.parametrize("name", ["int4-g32", "int4-asym-g32", "int8", "fp8"])
def test_gptq_loses_less_of_the_output_than_rounding(name: str) -> None:
    inputs = correlated(400, 96)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    hessian = Hessian(96)
    hessian.add(inputs)

    def lost(made: Tensor) -> float:
        return float((inputs @ (made - weight).t()).square().mean())

    clever = gptq(weight, hessian, scheme(name), "minmax", torch.bfloat16)
    plain = round_to_nearest(weight, scheme(name), "minmax", torch.bfloat16)
    assert torch.equal(clever.scale, clever.scale.bfloat16().float())
    assert lost(clever.dequantized()) < 0.6 * lost(plain.dequantized())


def test_inputs_that_never_come_are_rounded_and_no_more() -> None:
    inputs = correlated(200, 64)
    inputs[:, 7] = 0
    inputs[:, 20:40] = inputs[:, :20]  # of lower rank
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    hessian = Hessian(64)
    hessian.add(inputs)
    found = gptq(weight, hessian, scheme("int8"), "minmax", torch.float32)
    plain = round_to_nearest(weight, scheme("int8"), "minmax", torch.float32)
    assert torch.equal(found.values[:, 7], plain.values[:, 7])
    assert bool(found.dequantized().isfinite().all())
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_layer_at_a_time_is_the_model(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / kind, kind)
    files = open_model(str(model.path))
    weights, shape = Weights(files), files.shape
    hidden: Tensor | None = weights.embedding()[ROWS]
    for number in range(shape.num_layers):
        assert hidden is not None
        hidden = LayerRun(shape, number, weights.layer(number), 24)(hidden)
    assert hidden is not None
    head = weights.head()
    logits = rms_norm(hidden, weights.final_norm(), shape.rms_norm_eps) @ (weights.embedding() if head is None else head).t()
    torch.testing.assert_close(logits[3], model.oracle_logits(ROWS[3].tolist()), rtol=1e-4, atol=2e-4)
    assert num_parameters(shape) == model.oracle.num_parameters()


# --- the demo model ------------------------------------------------------------------------------------------------


def test_the_demo_model_loses_less_by_gptq(tmp_path: Path) -> None:
    files = open_model(str(DEMO_MODEL))
    rows = rows_of(files, read_text([Path(quantize.__file__).parent]), 40, 128)
    calibration, measured = rows[:24], rows[24:]
    lost = {}
    for method in ("rtn", "gptq"):
        made = quantize.quantize(files, plan("layers.0-1: int4-g32", method=method), calibration, tmp_path / method)
        made.finish()
        found = evaluate(str(tmp_path / method), str(DEMO_MODEL), measured, dtype="float32", threads=1)
        assert found.divergence is not None
        lost[method] = found.divergence.value
        assert found.gigabytes_per_billion < 1.6
    assert lost["gptq"] < 0.7 * lost["rtn"]
    assert (tmp_path / "gptq" / "tokenizer.json").read_bytes() == (DEMO_MODEL / "tokenizer.json").read_bytes()
    assert "model.embed_tokens.weight" in contents(tmp_path / "gptq")


# --- whole models --------------------------------------------------------------------------------------------------


def test_each_linear_is_as_the_recipe_says(tiny: TinyModel, tmp_path: Path) -> None:
    recipe = "lm_head: int8, layers.0: fp32, k_proj: int4-asym-g8, down_proj: fp8, layers.2: int8-dynamic, layers.1-2: int4-g12"
    quantize.quantize(open_model(str(tiny.path)), plan(recipe), ROWS, tmp_path / "out").finish()
    files = open_model(str(tmp_path / "out"))
    assert files.quantization is not None
    expected = {
        "lm_head": "int8",
        "model.layers.0.self_attn.k_proj": "None",
        "model.layers.1.self_attn.k_proj": "int4-asym-g8",
        "model.layers.3.mlp.down_proj": "fp8",
        "model.layers.1.self_attn.o_proj": "int4-g12",
        "model.layers.2.self_attn.o_proj": "int8-dynamic",
        "model.layers.3.self_attn.o_proj": "None",
    }
    assert {name: str(files.quantization.scheme_of(name)) for name in expected} == expected
    tensors, before = contents(tmp_path / "out"), contents(tiny.path)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float32
    assert torch.equal(tensors["model.layers.3.self_attn.o_proj.weight"], before["model.layers.3.self_attn.o_proj.weight"])
    assert torch.equal(tensors["model.norm.weight"], before["model.norm.weight"])
    assert tensors["model.layers.1.self_attn.o_proj.weight_scale"].dtype == torch.bfloat16


def test_transformers_computes_what_was_made(tiny: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = plan("k_proj: int8, rest: int4-g6")
    quantize.quantize(open_model(str(tiny.path)), recipe, ROWS, tmp_path / "out").finish()
    quantize.quantize(open_model(str(tmp_path / "out")), plan("fp32"), ROWS, tmp_path / "cast").finish()
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "float32"
    logits = []
    for name in ("out", "cast"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits.append(model(ROWS[:2]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert logits[0].shape == (2, 24, VOCAB)


def test_a_cast_is_of_all_tensors(tiny: TinyModel, tmp_path: Path) -> None:
    quantize.quantize(open_model(str(tiny.path)), plan("fp16"), ROWS, tmp_path / "out").finish()
    assert {tensor.dtype for tensor in contents(tmp_path / "out").values()} == {torch.float16}
    assert open_model(str(tmp_path / "out")).shape.dtype == "float16"


def test_large_models_are_in_several_files(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_model(str(tiny.path))
    quantize.quantize(files, plan("int8"), ROWS, tmp_path / "whole").finish()
    monkeypatch.setattr(parts, "SHARD_BYTES", 30_000)
    quantize.quantize(files, plan("int8"), ROWS, tmp_path / "sharded").finish()
    names = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    whole, sharded = contents(tmp_path / "whole"), contents(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_one_layer_is_in_memory_at_a_time(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    layer = Weights.layer

    def counted(self: Weights, number: int) -> dict[str, Tensor]:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], f"before layer {number}"
        found = layer(self, number)
        alive[:] = [weakref.ref(tensor) for tensor in found.values()]
        return found

    monkeypatch.setattr(Weights, "layer", counted)
    made = quantize.quantize(open_model(str(tiny.path)), plan("int4-g12"), ROWS, tmp_path / "out")
    assert alive
    assert not list(made.folder.glob("hidden-*"))


# --- interruptions and refusals ------------------------------------------------------------------------------------


def test_it_goes_on_where_it_was_interrupted(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, recipe = open_model(str(tiny.path)), plan("rest: int4-g12")
    quantize.quantize(files, recipe, ROWS, tmp_path / "whole").finish()
    write, done = parts.Parts.write, list[int]()

    def interrupted(self: parts.Parts, number: int, tensors: dict[str, Tensor]) -> None:
        if number == 2 and not done:
            done.append(number)
            raise KeyboardInterrupt
        write(self, number, tensors)

    monkeypatch.setattr(parts.Parts, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(files, recipe, ROWS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"out.partial is there from before: go on with --resume"):
        quantize.quantize(files, recipe, ROWS, tmp_path / "out")
    with pytest.raises(ConfigError, match="begun with other settings: scheme, text"):
        quantize.quantize(files, plan("rest: int4-g6"), ROWS + 1, tmp_path / "out", resume=True)
    read: list[int] = []
    layer = Weights.layer

    def noted(self: Weights, number: int) -> dict[str, Tensor]:
        read.append(number)
        return layer(self, number)

    monkeypatch.setattr(Weights, "layer", noted)
    quantize.quantize(files, recipe, ROWS, tmp_path / "out", resume=True).finish()
    assert read == [2, 3]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"out", "whole"}


def test_hidden_states_that_are_gone_are_missed(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, recipe = open_model(str(tiny.path)), plan("int4-g12")
    monkeypatch.setattr(quantize._Work, "rest", lambda self: 1 / 0)
    monkeypatch.setattr(parts.Parts, "finished", 1)
    with pytest.raises(ConfigError, match="layer 1 would go on"):
        quantize.quantize(files, recipe, ROWS, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        ("qwen3-tied-bias", "lm_head: int8", "the lm_head is the embedding"),
        ("qwen3", "int4-g128", "q_proj cannot be int4-g128: its 48 inputs do not divide"),
        ("qwen3", "router: int8", "means no linear"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, kind: str, recipe: str, message: str) -> None:
    files = open_model(str(make_model(tmp_path / "model", kind).path))
    with pytest.raises(ConfigError, match=message):
        quantize.quantize(files, plan(recipe), ROWS, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_a_tied_head_stays_with_the_embedding(tmp_path: Path) -> None:
    files = open_model(str(make_model(tmp_path / "model", "qwen3-tied-bias").path))
    quantize.quantize(files, plan("rest: int8"), ROWS, tmp_path / "out").finish()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    with pytest.raises(ConfigError, match="quantized already"):
        quantize.quantize(open_model(str(tmp_path / "out")), plan("int8"), ROWS, tmp_path / "again")
    with pytest.raises(ConfigError, match="out exists already"):
        quantize.quantize(files, plan("rest: int8"), ROWS, tmp_path / "out")


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_not_ours_is_left_alone(tiny: TinyModel, tmp_path: Path, resume: bool) -> None:
    other = tmp_path / "out.partial" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(ConfigError, match=r"out.partial exists already and holds no unfinished model"):
        quantize.quantize(open_model(str(tiny.path)), plan("int8"), ROWS, tmp_path / "out", resume=resume)
    assert other.read_text() == "mine"
    with pytest.raises(ConfigError, match="no name for a new directory"):
        quantize.quantize(open_model(str(tiny.path)), plan("int8"), ROWS, Path())


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """With the demo's tokenizer."""
    made = make_model(tmp_path_factory.mktemp("speaking") / "model", "qwen3", vocab_size=4096, layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, made.path)
    return open_model(str(made.path))


def test_a_model_that_lost_too_much_is_kept_back(speaking: ModelFiles, tmp_path: Path) -> None:
    out, text = tmp_path / "out", [DEMO_MODEL / "README.md"]
    settings: dict[str, Any] = {"text": text, "samples": 8, "context": 16, "max_loss": 1e-6}
    with pytest.raises(ConfigError, match=r"out would be .* nats per token .* more than 1e-06 .* --resume --force takes it"):
        make(speaking, plan("int4-g6"), out, **settings)
    assert not out.exists()
    found = make(speaking, plan("int4-g6"), out, **settings, resume=True, force=True)
    assert found is not None
    assert found.divergence is not None
    assert found.divergence.value > 1e-6
    assert json.loads((out / "quantization.json").read_text())["divergence"]["value"] == found.divergence.value
    with pytest.raises(ConfigError, match="too short"):
        make(speaking, plan("int4-g6"), tmp_path / "other", text=text, context=512)


def test_the_command_line(speaking: ModelFiles, tmp_path: Path) -> None:
    out, text = str(tmp_path / "out"), str(DEMO_MODEL / "README.md")
    small = ["--text", text, "--context", "16"]
    done = CliRunner().invoke(cli, ["quantize", str(speaking.path), out, "--scheme", "int8", *small], catch_exceptions=False)
    assert "nats per token from the base" in done.output
    for changes in (["--scheme", "int5"], ["--scheme", "donw_proj: int4, rest: int8"]):
        wrong = CliRunner().invoke(cli, ["quantize", str(speaking.path), f"{out}-wrong", *changes, *small])
        assert isinstance(wrong.exception, ConfigError)
    again = CliRunner().invoke(cli, ["quantize", out, f"{out}-mixed", "--scheme", "mixed", *small])
    assert isinstance(again.exception, ConfigError)
    assert "quantized already" in str(again.exception)
    percentile = ["--scheme", "int8", "--range", "percentile", *small]
    CliRunner().invoke(cli, ["quantize", str(speaking.path), f"{out}-percentile", *percentile], catch_exceptions=False)
    expected = quantized(Weights(speaking).layer(0)["mlp.down_proj.weight"], scheme("int8"), "percentile")
    found = contents(Path(f"{out}-percentile"))["model.layers.0.mlp.down_proj.weight_scale"]
    assert torch.equal(found, expected.scale.to(found.dtype))
    told = CliRunner().invoke(cli, ["eval", out, "--against", str(speaking.path), "--json", *small], catch_exceptions=False)
    assert json.loads(told.output)["agreement"]["value"] > 0.8
    against = ["eval", out, "--against", str(speaking.path), "--than", out, *small]
    same = json.loads(CliRunner().invoke(cli, [*against, "--json"], catch_exceptions=False).output)
    assert same["compared"] == {
        "difference": dict.fromkeys(zero := ("value", "low", "high"), 0.0),
        "ratio": dict.fromkeys(zero, 1.0),
    }
    assert "on the same rows" in CliRunner().invoke(cli, against, catch_exceptions=False).output
    alone = CliRunner().invoke(cli, ["eval", out, "--than", out, *small])
    assert "--than needs --against" in str(alone.exception)


def test_mixed_precision_keeps_to_a_size_or_a_loss(speaking: ModelFiles, tmp_path: Path) -> None:
    text: dict[str, Any] = {"text": [DEMO_MODEL / "README.md"], "samples": 8, "context": 16}
    whole = size_of(speaking.path)
    found = make(speaking, Plan(UNCHANGED, "rtn"), tmp_path / "small", **text, target_bytes=int(whole * 0.99), max_loss=9.0)
    assert found is not None
    assert found.bytes < whole
    quantized = open_model(str(tmp_path / "small")).quantization
    assert quantized is not None
    kept = [name for name in all_linears(speaking.shape) if quantized.of(name) is None]
    assert kept, "not all have to be quantized for it"
    strict = make(speaking, Plan(UNCHANGED, "rtn"), tmp_path / "near", **text, max_loss=1e-3)
    assert strict is not None
    assert strict.divergence is not None
    assert strict.divergence.value <= 1e-3
    with pytest.raises(ValueError, match=r"takes .* MB at least"):
        make(speaking, Plan(UNCHANGED), tmp_path / "none", **text, target_bytes=1000)
    with pytest.raises(ConfigError, match="nothing can be quantized within these bounds"):
        make(speaking, Plan(UNCHANGED), tmp_path / "none", **text, max_loss=0.0)


def test_training_comes_after_calibration(speaking: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"text": [DEMO_MODEL / "README.md"], "samples": 8, "context": 16}
    before = make(speaking, plan("int4-g6"), tmp_path / "calibrated", **settings, max_loss=9.0)
    tuning = Tuning(steps=8, batch_tokens=128, micro_tokens=128, context=15, matrix_rate=3e-3)
    with pytest.raises(ConfigError, match="--resume --force takes it"):
        make(speaking, plan("int4-g6"), tmp_path / "tuned", **settings, tuning=tuning, max_loss=1e-9)
    longer = replace(tuning, steps=9)
    with pytest.raises(ConfigError, match="begun with other settings: training steps"):
        make(speaking, plan("int4-g6"), tmp_path / "tuned", **settings, tuning=longer, max_loss=9.0, resume=True)
    monkeypatch.setattr(posttraining, "tune", None)  # what was trained is taken
    after = make(speaking, plan("int4-g6"), tmp_path / "tuned", **settings, tuning=tuning, max_loss=1e-9, resume=True, force=True)
    assert before is not None
    assert after is not None
    assert before.divergence is not None
    assert after.divergence is not None
    assert after.divergence.value != before.divergence.value, "trained; that it helps is shown in test_qat"
    assert json.loads((tmp_path / "tuned" / "quantization.json").read_text())["training"]["steps"] == 8
    assert not (tmp_path / "tuned.partial").exists()
