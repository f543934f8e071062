"""A draft in miniature: trained on a target's distribution, resumed, measured, and served."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from transformers import Qwen3ForCausalLM
from typer.testing import CliRunner

from cluster.model import DEMO_MODEL, open_model
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from compress.acceptance import loops, main
from compress.distill import Distillation, DraftShape, Mixture, against, distill, encoded, read_text, student_of
from tests.workers.models import make_model

TEXT = "def double(value):\n    return 2 * value\n\n\nclass Doubled:\n    value = double(21)\n"
SIZE = DraftShape(hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("distill") / "target", "qwen3", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, made.path)
    return made.path


def recipe(**changes: object) -> Distillation:
    settings = {"minutes": None, "steps": 4, "context": 32, "long_context": 32, "batch_tokens": 128, "micro_tokens": 64}
    return Distillation(shape=SIZE, samples=3, compiled=False, **(settings | changes))  # type: ignore[arg-type]


def test_a_draft_is_trained_written_and_used(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.acceptance.PROMPTS", 2)
    monkeypatch.setattr("compress.acceptance.OUTPUT", 12)
    files = open_model(str(target))
    figures = distill(files, recipe(), [TEXT * 60], tmp_path / "draft", held_out_texts=[TEXT * 20])
    assert (figures["steps"], figures["tokens"]) == (4, 512)
    coupled, rejection = (figures["acceptance"][rule] for rule in ("coupled", "rejection"))
    assert set(coupled) == set(rejection) == {"greedy", "temperature 0.8"}
    assert coupled["greedy"] == rejection["greedy"], "nothing is rejected where nothing is drawn"
    assert all(len(found["by_position"]) == 4 and found["prompts"] == 2 for found in (*coupled.values(), *rejection.values()))
    (tmp_path / "text").write_text(TEXT * 20)
    arguments = [str(target), str(tmp_path / "draft"), "--held-out", str(tmp_path / "text"), "--out", str(tmp_path / "figures")]
    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.output.count("|\n") == 6
    assert json.loads((tmp_path / "figures").read_text()) == figures["acceptance"], "the same text, the same figures"
    assert json.loads((tmp_path / "draft" / "distillation.json").read_text())["kl_nats_per_token"] == figures["kl_nats_per_token"]
    assert not {"checkpoint.pt", "samples.pt"} & {file.name for file in (tmp_path / "draft").iterdir()}
    wrong = CliRunner().invoke(app, [str(target), str(tmp_path / "nowhere"), *arguments[2:]])
    assert (wrong.exit_code, "Traceback" in wrong.output) == (2, False)
    params = SamplingParams(seed=1, max_tokens=20)
    with LLM(str(target), threads=1, dtype="float32", speculative="draft", draft_model=str(tmp_path / "draft")) as llm:
        given = llm.generate([TEXT], params, ignore_eos=True)[0].outputs[0].token_ids
        assert llm.batcher.counters.proposed > 0
    with LLM(str(target), threads=1, dtype="float32") as llm:
        assert llm.generate([TEXT], params, ignore_eos=True)[0].outputs[0].token_ids == given


def test_training_lowers_the_divergence(target: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compress.training import Trainer

    files = open_model(str(target))
    teacher = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    torch.manual_seed(0)
    student = student_of(files, SIZE, teacher)
    text = encoded(files, [TEXT * 60])
    trainer = Trainer(recipe(steps=40, vector_rate=0.01), Mixture(text, text[:0].view(0, 1), 0.5), student, against(teacher))
    losses = []
    for _ in range(40):
        losses.append(trainer.train_step())
        trainer.schedule.advance(1.0)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    ids = text[None, :33].long()
    assert float(against(teacher)(teacher, ids).detach()) == pytest.approx(0.0, abs=1e-5)


def test_what_is_alike_begins_as_the_targets(target: Path) -> None:
    files = open_model(str(target))
    teacher = Qwen3ForCausalLM.from_pretrained(target, dtype=torch.float32)
    shape = DraftShape.of(files.shape, None, None, 1)
    student = student_of(files, shape, teacher)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert student.num_parameters() < teacher.num_parameters()
    assert DraftShape.of(files.shape, 192, None, 2) == DraftShape(192, 512, 2, 6, 3, 32)


def test_rows_are_mixed_in_the_share_asked_for() -> None:
    text, own = torch.zeros(1000, dtype=torch.int32), torch.ones(5, 40, dtype=torch.int32)
    rows = Mixture(text, own, 0.25).batch(0, 400, 60)
    assert rows.shape == (400, 60)
    assert 0.22 < float((rows[:, 0] == 1).float().mean()) < 0.28
    assert bool((rows == rows[:, :1]).all()), "no row is of both"


def test_too_little_text_is_said(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        distill(open_model(str(target)), recipe(), ["x"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        read_text([tmp_path / "empty"])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "text").write_text("abc")
    assert read_text([tmp_path / "bytes", tmp_path / "text"]) == ["abc"]


def test_loops_are_seen() -> None:
    assert loops([*range(100), *[5, 6, 7] * 20])
    assert loops([9] * 60)
    assert not loops(list(range(100)))
    assert not loops([1])
