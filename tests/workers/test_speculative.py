"""Speculation changes how many iterations it takes, and no token: any drafter, any division of the model, any parameters.

Each case has requests of its own, greedy and sampled. Over all tp x pp (and small pools, and without a prefix cache) that makes
12 x 50 requests for a scripted drafter, 5 x 60 for prompt lookup and 8 x 60 for a draft model.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Some
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.config import ConfigError
from cluster.model import DEMO_MODEL
from cluster.offline import LLM, Completion
from cluster.protocol import SamplingParams, StepPlan
from cluster.structs import replace
from tests.conftest import examples
from tests.workers.models import MAX_LEN, make_model
from tests.workers.spans import make_span
from workers.sequences import Span
from workers.speculative.drafter import Drafter
from workers.speculative.lookup import PromptLookup

VOCAB = 4099
PLAIN = SamplingParams(seed=0, max_tokens=1)


@dataclass
class Scripted:
    """Knows what will come, by seed and choice, and is wrong about one token in `wrong`."""

    outputs: dict[tuple[int, int], list[int]]
    wrong: int
    proposed: int = 0
    passes: list[tuple[int, float]] = field(default_factory=list)

    def propose(self, spans: Some[Span]) -> list[list[int]]:
        found = []
        for span in spans:
            state = span.state
            emitted = state.num_tokens - state.num_prompt
            coming = self.outputs[state.params.seed, state.choice][emitted : emitted + span.propose]
            found.append([(token + ((emitted + i) % self.wrong == 0)) % VOCAB for i, token in enumerate(coming)])
            self.proposed += len(found[-1])
        return found

    def move(self, plan: StepPlan) -> None:
        pass

    def forget(self, blocks: Some[int]) -> None:
        pass

    def odds(self, spans: Some[Span], like: Tensor) -> tuple[Tensor, list[bool]]:
        raise AssertionError("coupled draws do not ask")


def requests(count: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that repeat themselves, with any mixture of parameters."""
    rng = random.Random(seed)
    prompts, params = [], []
    for i in range(count):
        phrase = [rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 9))]
        prompts.append((phrase * 20)[: rng.randint(1, 60)])
        params.append(
            SamplingParams(
                seed=i,
                max_tokens=rng.randint(1, 24),
                n=rng.choice([1, 1, 1, 3]),
                temperature=rng.choice([0.0, 0.0, 0.4, 1.0]),
                top_k=rng.choice([0, 0, 12]),
                top_p=rng.choice([1.0, 0.7]),
                min_p=rng.choice([0.0, 0.1]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
                frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
                logit_bias=rng.choice([{}, {7: 3.0}]),
                logprobs=rng.choice([None, 0, 2]),
                prompt_logprobs=rng.choice([None, None, 1]),
                stop_token_ids=rng.choice([(), tuple(range(0, VOCAB, 9))]),
                min_tokens=rng.choice([0, 5]),
            )
        )
    return prompts, params


def check(given: list[Completion], wanted: list[Completion]) -> None:
    """A client sees the same; numbers to within what an order of summation can change."""
    for completion, right in zip(given, wanted, strict=True):
        for output, expected in zip(completion.outputs, right.outputs, strict=True):
            assert (output.token_ids, output.finish_reason, output.text) == (
                expected.token_ids,
                expected.finish_reason,
                expected.text,
            )
            assert len(output.logprobs) == len(expected.logprobs)
            for entry, other in zip(output.logprobs, expected.logprobs, strict=True):
                assert entry.top_ids == other.top_ids
                assert [entry.logprob, *entry.top_logprobs] == pytest.approx([other.logprob, *other.top_logprobs], abs=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads for two ranks, layers for two stages, and the demo's tokenizer."""
    made = make_model(tmp_path_factory.mktemp("speculative") / "m", "qwen3", vocab_size=VOCAB)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, made.path)
    return made.path


@pytest.fixture(scope="module")
def load(model: Path) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def load(**settings: Any) -> LLM:
        """Proposes as much as it may, however little stands, unless `settings` say otherwise."""
        usual: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_memory": "2MiB", "max_model_len": MAX_LEN}
        usual["speculative_pace"] = "fixed"
        size = made[0].runner.pool.bytes_per_block * (2 if "draft_model" in settings else 1) if made else 0
        for name, memory in (("blocks", "kv_memory"), ("host_blocks", "host_kv_memory")):
            if name in settings:
                settings[memory] = settings.pop(name) * size
        made.append(LLM(str(model), **usual | settings))
        return made[-1]

    yield load
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def plain(load: Callable[..., LLM]) -> LLM:
    return load()


GRIDS: list[dict[str, Any]] = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("wrong", [1, 3, 1000])
def test_all_tokens_are_those_without(plain: LLM, load: Callable[..., LLM], grid: dict[str, int], wrong: int) -> None:
    prompts, params = requests(50, seed=10 * wrong + GRIDS.index(grid))
    wanted = plain.generate(prompts, params, ignore_eos=True)
    outputs = {(p.seed, c): out.token_ids for p, done in zip(params, wanted, strict=True) for c, out in enumerate(done.outputs)}
    llm = load(speculative="lookup", **grid)
    drafter = Scripted(outputs, wrong)
    llm.ranks.runners[-llm.config.tp]._drafter = drafter
    steps = llm.batcher.last_step
    check(llm.generate(prompts, params, ignore_eos=True), wanted)
    counters = llm.batcher.counters
    assert drafter.proposed >= counters.proposed > 100
    assert (counters.accepted == counters.proposed) == (wrong == 1000)
    assert (counters.accepted == 0) == (wrong == 1)
    longest = max(len(tokens) for tokens in outputs.values())
    if wrong == 1000:
        assert llm.batcher.last_step - steps < longest * len(grid or "1"), "fewer iterations than tokens"
    llm.batcher.check_integrity()
    assert llm.stats().blocks_used == 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_speculation_changes_no_token_over_quantized_keys_and_values(load: Callable[..., LLM], model: Path, kv_dtype: str) -> None:
    prompts, params = requests(60, 11)
    wanted = load(kv_dtype=kv_dtype).generate(prompts, params, ignore_eos=True)
    for settings in ({"speculative": "lookup"}, {"speculative": "draft", "draft_model": str(model)}):
        llm = load(kv_dtype=kv_dtype, **settings)
        for _ in range(2):
            check(llm.generate(prompts, params, ignore_eos=True), wanted)
        assert llm.batcher.counters.accepted > 0


POOLS: list[dict[str, Any]] = [{}, {"tp": 2}, {"pp": 2}, {"blocks": 8, "max_num_seqs": 5}, {"prefix_cache": "off"}]


@pytest.mark.parametrize("settings", POOLS)
def test_lookup_changes_no_token(plain: LLM, load: Callable[..., LLM], settings: dict[str, Any]) -> None:
    prompts, params = requests(60, seed=700 + POOLS.index(settings))
    wanted = plain.generate(prompts, params, ignore_eos=True)
    llm = load(speculative="lookup", speculative_tokens=6, **settings)
    answers: list[Completion] = []
    for _ in range(2):  # the second time out of the prefix cache
        answers += llm.generate(prompts, params, ignore_eos=True)
        check(answers[-len(wanted) :], wanted)
    counters = llm.batcher.counters
    assert counters.proposed > counters.accepted > 0
    assert (counters.preemptions > 0) == ("blocks" in settings)
    told = [done.speculative for done in answers if done.speculative is not None]
    assert len(told) == len(answers)
    assert sum(one.proposed_tokens for one in told) == counters.proposed
    assert sum(one.accepted_tokens for one in told) == counters.accepted
    assert sum(one.steps for one in told) == counters.verified
    assert all(done.speculative is None for done in wanted)


HARD: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"blocks": 7, "max_num_seqs": 5},
    {"blocks": 7, "max_num_seqs": 5, "host_blocks": 40},
    {"prefix_cache": "off"},
    {"max_num_batched_tokens": 64},
]


@pytest.mark.parametrize("settings", HARD)
def test_a_model_as_its_own_draft(plain: LLM, load: Callable[..., LLM], model: Path, settings: dict[str, Any]) -> None:
    prompts, params = requests(60, seed=8 + 99 * HARD.index(settings))
    wanted = plain.generate(prompts, params, ignore_eos=True)
    llm = load(speculative="draft", draft_model=str(model), **settings)
    for _ in range(2):
        check(llm.generate(prompts, params, ignore_eos=True), wanted)
    counters = llm.batcher.counters
    assert counters.accepted > 0.97 * counters.proposed > 200, "the same logits, the same noise, penalties and filters"


def test_a_draft_that_knows_nothing_is_given_up(plain: LLM, load: Callable[..., LLM], model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", vocab_size=VOCAB)
    prompts, params = requests(40, 9)
    wanted = plain.generate(prompts, params, ignore_eos=True)
    llm = load(speculative="draft", draft_model=str(other.path))
    check(llm.generate(prompts, params, ignore_eos=True), wanted)
    assert llm.batcher.counters.accepted < 0.1 * llm.batcher.counters.proposed
    wise = load(speculative="draft", draft_model=str(other.path), speculative_pace="adaptive")
    long = [replace(p, max_tokens=60, stop_token_ids=(), n=1) for p in params]
    check(wise.generate(prompts, long, ignore_eos=True), plain.generate(prompts, long, ignore_eos=True))
    assert wise.batcher.counters.proposed < 0.1 * sum(p.max_tokens for p in long)


def test_a_draft_that_does_not_fit_is_refused(load: Callable[..., LLM], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", vocab_size=VOCAB - 1)
    with pytest.raises(ConfigError, match="same vocabulary"):
        load(speculative="draft", draft_model=str(other.path))
    with pytest.raises(ConfigError, match="go together"):
        load(speculative="draft")
    with pytest.raises(ConfigError, match="draft_revision is for a draft_model"):
        load(draft_revision="v2")
    short = make_model(tmp_path / "short", "llama", vocab_size=VOCAB).path / "config.json"
    entry = '"max_position_embeddings": '
    short.write_text(short.read_text().replace(f"{entry}{MAX_LEN}", f"{entry}{MAX_LEN - 1}"))
    with pytest.raises(ConfigError, match=f"positions for {MAX_LEN - 1} tokens, but max_model_len is {MAX_LEN}"):
        load(speculative="draft", draft_model=str(short.parent))


def test_a_stop_string_inside_an_accepted_run(plain: LLM, load: Callable[..., LLM]) -> None:
    params = SamplingParams(seed=3, max_tokens=40, temperature=0.0, logprobs=0)
    whole = plain.generate([[5, 6, 7]], params, ignore_eos=True)[0].outputs[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    wanted = plain.generate([[5, 6, 7]], params, ignore_eos=True, stop=[stop])
    llm = load(speculative="lookup", speculative_tokens=8)
    llm.runner._drafter = Scripted({(3, 0): whole.token_ids}, 1000)
    check(llm.generate([[5, 6, 7]], params, ignore_eos=True, stop=[stop]), wanted)
    assert llm.batcher.counters.accepted > 5


def test_beams_do_not_speculate(plain: LLM, load: Callable[..., LLM]) -> None:
    params = SamplingParams(max_tokens=12, n=2, beam_width=4)
    llm = load(speculative="lookup")
    prompt = [4, 5, 6] * 9
    check(llm.generate([prompt], params, ignore_eos=True), plain.generate([prompt], params, ignore_eos=True))
    assert llm.batcher.counters.proposed == 0


def test_rejected_tokens_never_enter_the_prefix_cache(plain: LLM, load: Callable[..., LLM]) -> None:
    llm = load(speculative="lookup", block_size=1)
    params = replace(PLAIN, max_tokens=30)
    right = plain.generate([[9, 8, 7]], params, ignore_eos=True)[0].outputs[0].token_ids
    llm.runner._drafter = Scripted({(0, 0): right}, 2)
    llm.generate([[9, 8, 7]], params, ignore_eos=True)
    tree = llm.batcher.kv.tree
    assert tree is not None
    assert tree.num_blocks <= 3 + 30
    prompt = [9, 8, 7, *right]
    for length in range(4, 30):
        wrong = [*prompt[: length - 1], (prompt[length - 1] + 1) % VOCAB, 3]
        again = llm.generate([wrong], replace(PLAIN, max_tokens=2), ignore_eos=True)
        check(again, plain.generate([wrong], replace(PLAIN, max_tokens=2), ignore_eos=True))


def longest_match(tokens: list[int]) -> int:
    """Where the latest of the longest repetitions of the end ends, by trying all; 0 if none is of two tokens at least."""
    best, place = 1, 0
    for end in range(1, len(tokens)):
        same = 0
        while same < 6 and same < end and tokens[end - 1 - same] == tokens[len(tokens) - 1 - same]:
            same += 1
        if same >= max(best, 2):
            best, place = same, end
    return place


@examples(300)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_lookup_finds_what_followed_the_longest_repetition(tokens: list[int], count: int) -> None:
    span = make_span(0, len(tokens), [], PLAIN, tokens)
    span = Span(span.state, span.start, span.end, True, propose=count)
    place = longest_match(tokens)
    drafter: Drafter = PromptLookup()
    assert drafter.propose([span]) == [tokens[place : place + count] if place and count else []]
    assert np.array_equal(span.state.tokens[: len(tokens)], tokens)
