"""Log-probabilities of prompts against transformers, however the prompt is cut into steps and whatever runs beside it."""

from itertools import pairwise

import pytest
import torch

from cluster.protocol import Admission, Chunk, NewSequence, SamplingParams, StepPlan, TokenLogprobs
from tests.workers.driver import Driver, greedy
from tests.workers.models import VOCAB, TinyModel, prompt
from workers import logprobs
from workers.logprobs import describe
from workers.runner import ModelRunner
from workers.sequences import PlanError

HEAVY = {"temperature": 0.7, "repetition_penalty": 1.7, "logit_bias": {3: 50.0}, "top_k": 2}
"""None of it may show in a log-probability."""


@pytest.fixture
def runner(tiny_models: dict[str, TinyModel]) -> ModelRunner:
    return tiny_models["qwen3"].runner()


def told(runner: ModelRunner, ids: list[int], cuts: list[int], count: int, others: int = 0) -> list[TokenLogprobs]:
    """Of positions 1 to len(ids) - 1, with the prompt cut at `cuts` and `others` decoding sequences in every batch before it."""
    driver = Driver(runner)
    for seq in range(others):
        driver.add(seq, prompt(5, seq), greedy())
        driver.step({seq: 5})
    params = SamplingParams(seed=1, max_tokens=4, prompt_logprobs=count, **HEAVY)  # type: ignore[arg-type]
    admitted = [Admission(90, 0, [], NewSequence(choice=0, prompt=ids, emitted=[], params=params))]
    found: list[TokenLogprobs] = []
    for step, (begin, end) in enumerate(pairwise([0, *cuts, len(ids)])):
        chunks = []
        for seq in range(others):
            other = driver.sequences[seq]
            blocks = [driver.free.pop()] if (5 + step) % runner.pool.block_size == 0 else []
            chunks.append(Chunk(seq, len(other.prompt) + step, 1, blocks, [], True))
        size = runner.pool.block_size
        blocks = [driver.free.pop() for _ in range(-(-end // size) - -(-begin // size))]
        scores = (begin + 1, min(end + 1, len(ids))) if begin + 1 < len(ids) else None
        chunks.append(Chunk(90, begin, end - begin, blocks, [], end == len(ids), scores))
        plan = StepPlan(epoch=0, step=step, admitted=admitted, chunks=chunks, copies=[], finished=[])
        result, admitted = runner.execute(plan), []
        if scores is None:
            assert result.scores == []
            continue
        (entry,) = result.scores
        assert (entry.seq, entry.first) == (90, 1 + len(found))
        found += entry.logprobs
    return found


@pytest.mark.parametrize("kind", ["llama", "llama3-rope-tied", "qwen3"])
@pytest.mark.parametrize("count", [0, 3, VOCAB + 9])
def test_they_are_those_of_transformers(tiny_models: dict[str, TinyModel], kind: str, count: int) -> None:
    model, ids = tiny_models[kind], prompt(30)
    expected = model.oracle_logits(ids).double().log_softmax(-1)
    found = told(model.runner(), ids, [], count)
    assert len(found) == 29
    for position, entry in enumerate(found, 1):
        row = expected[position - 1]
        own = row[ids[position]]
        assert entry.logprob == pytest.approx(float(own), abs=2e-4)
        assert entry.rank == int((row > own).sum()) + 1
        top = row.topk(min(count, VOCAB))
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("cuts", [[1], [29], [8, 16, 24], [7, 8, 9, 20], list(range(1, 30))])
@pytest.mark.parametrize("others", [0, 2])
def test_chunks_and_neighbours_change_nothing(runner: ModelRunner, cuts: list[int], others: int) -> None:
    ids = prompt(30)
    whole = told(runner, ids, [], 2)
    runner.reset()
    found = told(runner, ids, cuts, 2, others)
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)
    assert [(entry.top_ids, entry.rank) for entry in found] == [(entry.top_ids, entry.rank) for entry in whole]


def test_logits_are_made_in_slices(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(30)
    whole = told(runner, ids, [12], 2)
    sizes: list[int] = []
    original = runner.decoder.lm_head
    assert original is not None

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return original(hidden)

    monkeypatch.setattr(logprobs, "_MOST_ROWS", 5)
    object.__setattr__(runner.decoder, "lm_head", counting)
    runner.reset()
    found = told(runner, ids, [12], 2)
    assert sizes == [5, 5, 2, 5, 5, 5, 2, 1], "12 and 17 rows of prompt, and the one to draw from"
    assert [(entry.rank, entry.top_ids) for entry in found] == [(entry.rank, entry.top_ids) for entry in whole]
    monkeypatch.setattr(logprobs, "_MOST_LOGITS", 3 * VOCAB)
    sizes.clear()
    runner.reset()
    told(runner, ids, [], 0)
    assert max(sizes) == 3


def test_a_draw_is_the_same_beside_scores(runner: ModelRunner) -> None:
    drawn = []
    for scores in (None, (1, 20)):
        runner.reset()
        new = NewSequence(choice=0, prompt=prompt(20), emitted=[], params=SamplingParams(seed=5, max_tokens=3, prompt_logprobs=1))
        admitted, chunks = [Admission(0, 0, [], new)], [Chunk(0, 0, 20, [1, 2, 3], [], True, scores)]
        result = runner.execute(StepPlan(epoch=0, step=0, admitted=admitted, chunks=chunks, copies=[], finished=[]))
        drawn.append(result.results)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("scores", [(0, 5), (5, 5), (9, 11), (1, 21)])
def test_scores_that_a_chunk_cannot_tell_are_no_plan(runner: ModelRunner, scores: tuple[int, int]) -> None:
    new = NewSequence(choice=0, prompt=prompt(20), emitted=[], params=SamplingParams(prompt_logprobs=0))
    chunk = Chunk(0, 0, 9, [1, 2], [], False, scores)
    with pytest.raises(PlanError, match="scores"):
        runner.execute(StepPlan(epoch=0, step=0, admitted=[Admission(0, 0, [], new)], chunks=[chunk], copies=[], finished=[]))


def test_equal_tokens_share_a_rank() -> None:
    raw = torch.tensor([[1.0, 3.0, 3.0, 2.0]] * 4)
    entries = describe(raw, torch.arange(4), [0] * 4, ranked=True)
    assert [entry.rank for entry in entries] == [4, 1, 1, 3]
    assert [entry.rank for entry in describe(raw, torch.arange(4), [0] * 4)] == [None] * 4
