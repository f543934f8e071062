"""The whole engine in one process, on the demo model."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cluster.cli import DEMO_MODEL
from cluster.config import ConfigError
from cluster.offline import LLM
from cluster.protocol import SamplingParams

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
    assert tight.batcher.num_preemptions > 0
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
