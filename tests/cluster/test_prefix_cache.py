"""The prefix cache on the demo model: whatever is shared, evicted or copied, the tokens are those without it."""

import random
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from cluster.offline import LLM, Completion
from cluster.protocol import SamplingParams


def load(cache: str, **settings: Any) -> LLM:
    return LLM(str(DEMO_MODEL), dtype="float32", threads=1, prefix_cache=cache, **{"kv_memory": "8MiB", **settings})


TOKEN_BYTES = {"auto": 4096, "int8": 2 * 4 * 4 * (32 + 4), "fp8": 2 * 4 * 4 * (32 + 2)}
"""Of the demo model's KV, by kv_dtype."""


def tokens(completions: list[Completion]) -> list[list[list[int]]]:
    return [[output.token_ids for output in completion.outputs] for completion in completions]


@pytest.mark.parametrize(
    ("blocks", "tp", "pp", "kv_dtype"),
    [
        *((400, 1, 1, "auto"), (14, 1, 1, "auto"), (40, 1, 2, "auto"), (40, 2, 1, "auto")),
        *((14, 1, 1, "int8"), (40, 1, 2, "int8"), (40, 2, 1, "int8"), (14, 1, 1, "fp8")),
    ],
)
def test_overlapping_prompts_give_the_same_tokens_with_and_without(blocks: int, tp: int, pp: int, kv_dtype: str) -> None:
    """Waves of prompts that begin alike, end inside blocks, come together or later, in chunks, with a pool that is too small."""
    draw = random.Random(blocks)
    stems = [draw.choices(range(3, 2000), k=length) for length in (70, 33, 16)]
    prompts = []
    for _ in range(24):
        stem = draw.choice(stems)
        prompts.append(stem[: draw.randint(1, len(stem))] + draw.choices(range(3, 6), k=draw.randint(0, 20)))
    params = [
        SamplingParams(
            temperature=draw.choice([0.0, 0.9]), seed=draw.randrange(9), max_tokens=draw.randint(1, 20), n=draw.choice([1, 1, 3])
        )
        for _ in prompts
    ]
    found = []
    for cache in ("on", "off"):
        sizes = {"max_model_len": 128, "max_num_batched_tokens": 48, "max_num_seqs": 12}
        sizes["kv_memory"] = blocks * 16 * TOKEN_BYTES[kv_dtype]
        with load(cache, tp=tp, pp=pp, kv_dtype=kv_dtype, **sizes) as llm:
            waves = [llm.generate(prompts[:12], params[:12], ignore_eos=True), llm.generate(prompts, params, ignore_eos=True)]
            found.append([tokens(wave) for wave in waves])
            llm.batcher.check_integrity()
            assert llm.stats().blocks_used == 0
            assert (llm.batcher.counters.cached > 100) == (cache == "on")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("slots", "tp", "pp", "kv_dtype"),
    [
        *((60, 1, 1, "auto"), (5, 1, 1, "auto"), (60, 1, 2, "auto"), (60, 2, 1, "auto"), (7, 2, 2, "auto")),
        *((60, 1, 1, "int8"), (7, 2, 2, "int8"), (60, 1, 1, "fp8")),
    ],
)
def test_what_went_to_the_host_and_came_back_gives_the_same_tokens(slots: int, tp: int, pp: int, kv_dtype: str) -> None:
    """Conversations in turn that don't fit the pool together, on a host with room for all of them, or for little."""
    draw = random.Random(slots)
    histories = [draw.choices(range(3, 2000), k=draw.randint(20, 60)) for _ in range(6)]
    turns = [
        [(number, draw.choices(range(3, 2000), k=draw.randint(1, 9))) for number in draw.sample(range(6), 4)] for _ in range(4)
    ]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=8)
    block = 16 * TOKEN_BYTES[kv_dtype] // (tp * pp)
    found, loaded = [], []
    for host in (slots * block, 0):
        sizes = {"kv_memory": 16 * block, "max_model_len": 192, "max_num_batched_tokens": 64, "max_num_seqs": 4}
        with load("on", tp=tp, pp=pp, host_kv_memory=host, kv_dtype=kv_dtype, **sizes) as llm:
            told = [list(history) for history in histories]
            for turn in turns:
                for number, said in turn:
                    told[number] += said
                answers = llm.generate([told[number] for number, _ in turn], params, ignore_eos=True)
                for (number, _), answer in zip(turn, answers, strict=True):
                    told[number] += answer.outputs[0].token_ids
            llm.batcher.check_integrity()
            stats = llm.stats()
            assert 0 <= stats.host_blocks_used <= stats.host_blocks_total <= (slots if host else 0)
            assert stats.blocks_used == 0
            loaded.append(llm.batcher.counters.loaded)
            found.append(told)
    assert found[0] == found[1]
    assert loaded[0] > 0 == loaded[1]


def test_what_was_answered_is_found_by_the_next_turn() -> None:
    llm = load("on")
    prompt = list(range(3, 50))
    answer = llm.generate([prompt], SamplingParams(seed=1, max_tokens=40), ignore_eos=True)[0].outputs[0].token_ids
    before = llm.batcher.counters.cached
    llm.generate([[*prompt, *answer, 7, 8, 9]], SamplingParams(max_tokens=1))
    whole = (len(prompt) + len(answer) - 1) // 16 * 16  # the last token drawn was never computed
    assert llm.batcher.counters.cached - before == whole


def test_a_match_that_ends_inside_a_block_is_used_to_the_token() -> None:
    llm = load("on")
    llm.generate([list(range(3, 103))], SamplingParams(max_tokens=1))
    before = llm.batcher.counters.cached
    llm.generate([[*range(3, 63), 999, 998]], SamplingParams(max_tokens=1))
    assert llm.batcher.counters.cached - before == 60


def test_choices_take_little_more_than_one() -> None:
    """n = 8 on a prompt of 512 tokens: the KV at the first token, against n = 1."""
    used = {}
    for n in (1, 8):
        llm = load("on", kv_memory="16MiB")
        params = SamplingParams(seed=5, max_tokens=2, n=n)
        most = 0
        for _ in llm.stream(list(range(3, 515)), params):
            most = max(most, llm.stats().slots_allocated)
        used[n] = most
    assert used[8] < 1.3 * used[1]
