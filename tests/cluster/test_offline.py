"""The whole engine in one process, on the demo model."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cluster.config import ConfigError
from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import SamplingParams, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PROMPTS = ["def main(argv):\n", "class Parser:\n", "import os\n", "for name in"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(DEMO_MODEL), dtype="float32", threads=1, kv_memory="8MiB")


@pytest.fixture(autouse=True)
def _nothing_left(llm: LLM) -> Iterator[None]:
    yield
    assert (llm.stats().blocks_used, llm.stats().running, llm.stats().waiting) == (0, 0, 0)
    llm.batcher.check_integrity()


def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM) -> None:
    params = [GREEDY, SamplingParams(seed=3, max_tokens=20), SamplingParams(seed=4, max_tokens=30, top_p=0.8), GREEDY]
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate([prompt], own)[0] for prompt, own in zip(PROMPTS, params, strict=True)]
    assert [c.outputs[0].token_ids for c in together] == [c.outputs[0].token_ids for c in alone]


@pytest.mark.parametrize("settings", [{"batching": "static"}, {"reservation": "max_tokens"}, {"max_num_batched_tokens": 16}])
def test_policies_change_no_token(llm: LLM, settings: dict[str, Any]) -> None:
    small: dict[str, Any] = {"max_num_seqs": 16, "max_model_len": 256, "kv_memory": "8MiB"}
    other = LLM(str(DEMO_MODEL), dtype="float32", threads=1, **{**small, **settings})
    wanted = [c.outputs[0].token_ids for c in llm.generate(PROMPTS, GREEDY)]
    assert [c.outputs[0].token_ids for c in other.generate(PROMPTS, GREEDY)] == wanted


def test_preemption_changes_no_token(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=60)
    tight = LLM(str(DEMO_MODEL), dtype="float32", threads=1, max_model_len=96, kv_memory=14 * 16 * 4096)
    prompts = [[i + 3] * 20 for i in range(6)]
    given = [c.outputs[0].token_ids for c in tight.generate(prompts, params, ignore_eos=True)]
    assert tight.batcher.counters.preemptions > 0
    assert given == [c.outputs[0].token_ids for c in llm.generate(prompts, params, ignore_eos=True)]


def test_choices_share_their_prompt(llm: LLM) -> None:
    prompt = list(range(3, 103))
    params = SamplingParams(seed=5, max_tokens=8, n=4)
    outputs = llm.generate([prompt], params, ignore_eos=True)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    for choice, output in enumerate(outputs):
        again = msgspec.structs.replace(params, n=choice + 1)
        assert llm.generate([prompt], again, ignore_eos=True)[0].outputs[choice].token_ids == output.token_ids


def test_streaming_gives_the_same_text_and_can_be_left(llm: LLM) -> None:
    whole = llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].text
    assert "".join(progress.text for progress in llm.stream(PROMPTS[0], GREEDY)) == whole
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_stop_strings(llm: LLM) -> None:
    whole = llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].text
    stop = whole[10:13]
    cut = llm.generate([PROMPTS[0]], GREEDY, stop=[stop])[0].outputs[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_prompt_logprobs_of_a_prompt_preempted_while_they_are_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt advances by a token a step, until an older sequence's output takes its blocks. What is told of it stays the
    same, and comes once."""
    small: dict[str, Any] = {"max_model_len": 112, "kv_memory": 9 * 16 * 4096, "max_num_seqs": 2, "max_num_batched_tokens": 2}
    tight = LLM(str(DEMO_MODEL), dtype="float32", threads=1, **small)
    execute, reached, cut = tight.runner.execute, dict[int, int](), list[int]()

    def watched(plan: StepPlan) -> StepResult:
        for chunk in plan.chunks:
            if chunk.start == 0 and chunk.seq in reached:
                cut.append(reached[chunk.seq])
            reached[chunk.seq] = chunk.start + chunk.num_tokens
        return execute(plan)

    monkeypatch.setattr(tight.runner, "execute", watched)
    prompts = [[5, 6, 7, 8], list(range(3, 83))]
    params = [SamplingParams(seed=1, max_tokens=most, prompt_logprobs=2, n=n) for most, n in ((80, 1), (8, 2))]
    given = tight.generate(prompts, params, ignore_eos=True)
    assert any(0 < position < len(prompts[1]) for position in cut), "it was preempted within its prompt"
    alone = [llm.generate([prompt], own, ignore_eos=True)[0] for prompt, own in zip(prompts, params, strict=True)]
    for prompt, one, other in zip(prompts, given, alone, strict=True):
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert (len(one.prompt_logprobs), one.prompt_logprobs[0]) == (len(prompt), None)
        for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert mine is not None
            assert theirs is not None
            assert (mine.rank, mine.top_ids) == (theirs.rank, theirs.top_ids)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [output.token_ids for output in one.outputs] == [output.token_ids for output in other.outputs]


def test_an_output_scores_as_it_was_drawn(llm: LLM) -> None:
    """What a greedy output's tokens were said to have is what scoring prompt and output as one prompt says."""
    drawn = llm.generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=12, logprobs=1), ignore_eos=True)[0]
    whole = drawn.prompt_token_ids + drawn.outputs[0].token_ids
    (scored,) = llm.generate([whole], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert scored.prompt_logprobs is not None
    assert (scored.outputs[0].token_ids, scored.outputs[0].finish_reason) == ([], "length")
    for told, entry in zip(drawn.outputs[0].logprobs, scored.prompt_logprobs[len(drawn.prompt_token_ids) :], strict=True):
        assert entry is not None
        assert (entry.rank, entry.top_ids) == (1, told.top_ids)
        assert entry.logprob == pytest.approx(told.logprob, abs=1e-4)


def test_min_tokens_and_what_ends_show_as_asked(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    (whole,) = llm.generate([PROMPTS[0]], params, ignore_eos=True)
    ids = whole.outputs[0].token_ids
    stop = ids[3]
    ends = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(stop,))
    assert llm.generate([PROMPTS[0]], ends, ignore_eos=True)[0].outputs[0].token_ids == ids[: ids.index(stop) + 1]
    later = msgspec.structs.replace(ends, min_tokens=10)
    output = llm.generate([PROMPTS[0]], later, ignore_eos=True)[0].outputs[0].token_ids
    assert stop not in output[:10]
    assert len(output) > 10
    text = whole.outputs[0].text
    cut = llm.generate([PROMPTS[0]], GREEDY, stop=[text[10:13]], include_stop=True)[0].outputs[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(text[10:13]) + 3], "stop")
    eos = SamplingParams(max_tokens=4, logit_bias={0: 100.0})
    assert llm.generate([PROMPTS[0]], eos)[0].outputs[0].text == ""
    assert llm.generate([PROMPTS[0]], eos, include_stop=True, skip_special_tokens=False)[0].outputs[0].text == "<|endoftext|>"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ("", "empty"), ([4096], "out of range"), ([-1], "out of range"), ([1] * 2000, "exceed")],
)
def test_prompts_that_cannot_run(llm: LLM, prompt: list[int] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["fine", prompt], GREEDY)


def test_models_that_cannot_load() -> None:
    with pytest.raises(ConfigError, match="no such model directory"):
        LLM("/no/such/model")
    with pytest.raises(ConfigError, match="hold no pool"):
        LLM(str(DEMO_MODEL), kv_memory="1k")
    with pytest.raises(ConfigError, match="unknown setting"):
        LLM(str(DEMO_MODEL), kv_memry="1k")
