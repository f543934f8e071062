"""Beam search on the demo model: the same outputs in whatever batch, pool and division of the model."""

from typing import Any

import pytest
import torch

from cluster.model import DEMO_MODEL
from cluster.offline import LLM, Completion
from cluster.protocol import SamplingParams
from cluster.structs import replace

PROMPTS = ["def main(argv):\n", "class Parser:\n    def", "import os\nimport", "for name in", "def main(argv):\n    if", "return"]
BEAMS = SamplingParams(max_tokens=24, n=3, beam_width=4, logprobs=2)
PARAMS = [
    BEAMS,
    SamplingParams(temperature=0.0, max_tokens=30),
    replace(BEAMS, n=1, length_penalty=0.0, stop_token_ids=(10, 12), prompt_logprobs=0),
    SamplingParams(seed=3, max_tokens=30, n=3),
    replace(BEAMS, n=6, beam_width=6, early_stopping=True, min_tokens=4),
    SamplingParams(seed=4, max_tokens=30, top_p=0.8),
]


def load(**settings: Any) -> LLM:
    return LLM(str(DEMO_MODEL), dtype="float32", threads=1, **{"kv_memory": "8MiB", "max_model_len": 96, **settings})


def tokens(completions: list[Completion]) -> list[list[list[int]]]:
    return [[output.token_ids for output in completion.outputs] for completion in completions]


@pytest.fixture(scope="module")
def alone() -> list[Completion]:
    """Each by itself."""
    llm = load(prefix_cache="off")
    return [llm.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"prefix_cache": "off", "max_num_batched_tokens": 16, "max_num_seqs": 12},
    {"kv_memory": 10 * 16 * 4096, "max_num_seqs": 12},
    {"kv_memory": 10 * 16 * 4096, "max_num_seqs": 12, "prefix_cache": "off"},
    {"tp": 2},
    {"pp": 2, "max_num_batched_tokens": 16, "max_num_seqs": 12},
    {"pp": 2, "kv_memory": 10 * 16 * 4096, "max_num_seqs": 8},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_outputs_depend_on_nothing_else(alone: list[Completion], settings: dict[str, Any]) -> None:
    with load(**settings) as llm:
        together = llm.generate(PROMPTS, PARAMS)
        llm.batcher.check_integrity()
        assert (llm.stats().blocks_used, llm.batcher.num_sequences) == (0, 0)
        assert llm.batcher.counters.preemptions > 0 or settings.get("kv_memory") is None
    assert tokens(together) == tokens(alone)
    for one, other in zip(together, alone, strict=True):
        for ours, theirs in zip(one.outputs, other.outputs, strict=True):
            assert ours.finish_reason == theirs.finish_reason
            told = [[entry.logprob for entry in output.logprobs] for output in (ours, theirs)]
            torch.testing.assert_close(torch.tensor(told[0]), torch.tensor(told[1]), atol=1e-4, rtol=0)


def test_the_best_come_first(alone: list[Completion]) -> None:
    for completion, params in zip(alone, PARAMS, strict=True):
        if not params.beam_width:
            continue
        assert len({tuple(output.token_ids) for output in completion.outputs}) == params.n
        totals = [(sum(told.logprob for told in output.logprobs), len(output.token_ids)) for output in completion.outputs]
        scores = [total / length**params.length_penalty for total, length in totals]
        assert scores == sorted(scores, reverse=True)
        for output in completion.outputs:
            assert params.min_tokens < len(output.token_ids) <= params.max_tokens
            assert [len(told.top_ids) for told in output.logprobs] == [2] * len(output.token_ids)
    scored = alone[2].prompt_logprobs
    assert scored is not None
    assert len(scored) == len(alone[2].prompt_token_ids)


def test_what_can_not_be_searched_is_refused() -> None:
    llm = load(max_num_seqs=4)
    with pytest.raises(ValueError, match="stop strings"):
        llm.generate(["x"], BEAMS, stop=["a"])
    with pytest.raises(ValueError, match="beam width"):
        llm.generate(["x"], replace(BEAMS, beam_width=5))
    with pytest.raises(ValueError, match="top_p"):
        llm.generate(["x"], replace(BEAMS, top_p=0.5))
    with pytest.raises(ValueError, match="fork"):
        load(batching="static").generate(["x"], BEAMS)
