"""Rejection sampling: the target's distribution whatever is proposed, the coupled output where nothing is drawn, and repeatable."""

import itertools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Some
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import NewSequence, SamplingParams
from cluster.structs import replace
from tests.workers.models import MAX_LEN, make_model
from tests.workers.test_speculative import VOCAB, check, requests
from workers.draws import DrawSetup
from workers.keys import ACCEPT, DRAFT, position_keys, sequence_key, stream_key, uniforms
from workers.sequences import SequenceState, Span
from workers.speculative.draft import DraftModel
from workers.speculative.lookup import PromptLookup
from workers.speculative.rejection import RejectionSampling, distribution, judge

LEAST_P = 1e-5
"""The distribution is refuted where chi-square has a p-value below it. Seeds are fixed, and none was picked."""
IDS = 6
PROMPT = [0, 1, 2, 0]
DRAWS = 100_000


def p_value(counts: NDArray[np.int64], chances: NDArray[np.float64]) -> float:
    """Of Pearson's chi-square, by Wilson and Hilferty's approximation. Cells are pooled that are rare."""
    expected = chances.ravel() * counts.sum()
    order = np.argsort(expected)
    rare = order[np.cumsum(expected[order]) < 10]
    kept = np.setdiff1d(np.arange(len(order)), rare)
    assert counts.ravel()[expected == 0].sum() == 0, "what the filters drop is never drawn"
    seen = np.append(counts.ravel()[kept], counts.ravel()[rare].sum())
    wanted = np.append(expected[kept], expected[rare].sum())
    some = wanted > 0
    square, free = float(((seen - wanted)[some] ** 2 / wanted[some]).sum()), int(some.sum()) - 1
    z = ((square / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return 0.5 * math.erfc(z / math.sqrt(2))


class Tables:
    """A model whose logits depend on the last token alone: row t of [IDS, IDS] follows token t."""

    def __init__(self, seed: int, like: "Tables | None" = None, noise: float = 1.0) -> None:
        made = torch.randn(IDS, IDS, generator=torch.Generator().manual_seed(seed)) * 1.3 * noise
        self.logits: Tensor = made if like is None else like.logits + made

    def after(self, spans: Some[Span]) -> Tensor:
        return self.logits[[int(span.state.tokens[span.end - 1]) for span in spans]].clone()

    def chances(self, params: SamplingParams) -> Tensor:
        """[IDS, IDS] fp32"""
        spans = [span_of(params, [token]) for token in range(IDS)]
        return distribution(self.after(spans), spans)


def span_of(params: SamplingParams, tokens: list[int], choice: int = 0) -> Span:
    """With room for more tokens."""
    setup = DrawSetup.of(NewSequence(choice=choice, prompt=tokens, emitted=[], params=params))
    ids = np.array([*tokens, 0, 0, 0, 0, 0, 0], dtype=np.int32)
    return Span(SequenceState(choice, choice, setup, len(tokens), ids, len(tokens), ids), 0, len(tokens), True)


def exact(target: Tables, params: SamplingParams) -> NDArray[np.float64]:
    """[IDS, IDS]: the chances of the first two tokens, by the rule of chance."""
    found = np.zeros((IDS, IDS))

    def after(tokens: list[int]) -> NDArray[np.float64]:
        span = span_of(params, PROMPT)
        for token in tokens:
            span.state.put_tokens(span.state.num_tokens, [token])
        span = Span(span.state, 0, span.state.num_tokens, True)
        chances: NDArray[np.float64] = distribution(target.after([span]), [span])[0].double().numpy()
        return chances

    one = after([])
    for token in range(IDS):
        if one[token]:
            found[token] = one[token] * after([token])
    total: float = found.sum()
    scaled: NDArray[np.float64] = found / total
    return scaled


FILTERS = SamplingParams(seed=1, max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)
PENALTIES = replace(FILTERS, frequency_penalty=0.6, logit_bias={2: 0.7}, repetition_penalty=1.2, min_tokens=1, stop_token_ids=(4,))
TARGET, DRAFTS = Tables(1), {"good draft": Tables(2, like=Tables(1), noise=0.3), "bad draft": Tables(3)}


def compare(counts: NDArray[np.int64], wanted: NDArray[np.float64]) -> None:
    assert p_value(counts, wanted) > LEAST_P
    skewed = np.where(wanted > 0, wanted * np.linspace(0.9, 1.1, wanted.size).reshape(wanted.shape), 0)
    assert p_value(counts, skewed / skewed.sum()) < LEAST_P or counts.sum() < DRAWS, "a tenth more or less would be seen"


@pytest.mark.parametrize("how", ["good draft", "bad draft", "lookup"])
@pytest.mark.parametrize("params", [SamplingParams(max_tokens=9), FILTERS])
def test_the_first_two_tokens_are_distributed_as_the_targets(how: str, params: SamplingParams) -> None:
    """Two are proposed at a time, one after the other of 100,000 choices' own streams."""
    p, sampling = TARGET.chances(params), RejectionSampling(IDS, torch.device("cpu"))
    q = None if how == "lookup" else DRAFTS[how].chances(params)
    keys = [sequence_key(1, choice) for choice in range(DRAWS)]
    streams = {stream: [stream_key(key, stream) for key in keys] for stream in (DRAFT, ACCEPT)}
    tokens = np.zeros((DRAWS, 4), dtype=np.int64)  # the prompt's last, two wanted, and one that may come besides
    length = np.ones(DRAWS, dtype=np.int64)
    while (going := np.flatnonzero(length < 3)).size:
        last, places, odds, proposed = tokens[going, length[going] - 1], [], [], []
        rows = [p[last]]
        for ahead in range(2):
            places.append(length[going] + ahead)
            if q is None:
                proposed.append((last + 1 + ahead) % IDS)
                odds.append(torch.eye(IDS)[proposed[-1]])
            else:
                odds.append(q[last])
                proposed.append(
                    sampling.draw(q[last], position_keys([streams[DRAFT][i] for i in going], places[-1].tolist())).numpy()
                )
            last = proposed[-1]
            rows.append(p[last])
        numbers = [uniforms([streams[ACCEPT][i] for i in going], place.tolist()) for place in places]
        accepted, wanted = judge(
            torch.stack(rows, dim=1).flatten(0, 1),
            torch.stack(odds, dim=1).flatten(0, 1),
            np.stack(proposed, axis=1).ravel(),
            np.full(len(going), 2),
            np.full(len(going), True),
            np.stack(numbers, axis=1).ravel(),
        )
        drawn = sampling.draw(wanted, position_keys([keys[i] for i in going], (length[going] + accepted).tolist())).numpy()
        for ahead in range(2):
            some = accepted > ahead
            tokens[going[some], np.minimum(length[going[some]] + ahead, 3)] = proposed[ahead][some]
        tokens[going, np.minimum(length[going] + accepted, 3)] = drawn
        length[going] += accepted + 1
    counts = np.zeros((IDS, IDS), dtype=np.int64)
    np.add.at(counts, (tokens[:, 1], tokens[:, 2]), 1)
    assert counts.sum() == DRAWS
    compare(counts, exact(TARGET, params))


class TableDraft:
    """A Drafter of such a model, by the arithmetic of DraftModel."""

    def __init__(self, tables: Tables, sampling: RejectionSampling) -> None:
        self.tables, self.sampling = tables, sampling
        self.found: list[Tensor] = []

    def propose(self, states: Some[SequenceState], count: int) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in states]
        self.found = []
        for place in range(count):
            spans = [Span(state, 0, state.num_tokens + place, True) for state in states]
            drawn, odds = self.sampling.propose(self.tables.after(spans), spans)
            self.found.append(odds)
            for state, own, token in zip(states, tokens, drawn, strict=True):
                own.append(token)
                state.suggest(state.num_tokens + place, token)
        return tokens

    def odds(self, spans: Some[Span], like: Tensor) -> tuple[Tensor, list[bool]]:
        return torch.stack(self.found, dim=1).flatten(0, 1), [True] * len(spans)


def repeated(states: Some[SequenceState], count: int) -> list[list[int]]:
    """What prompt lookup may propose: the beginning again."""
    return [state.tokens[:count].tolist() for state in states]


@pytest.mark.parametrize("how", ["good draft", "bad draft", "lookup"])
def test_penalties_count_what_was_proposed_before(how: str) -> None:
    sampling, counts = RejectionSampling(IDS, torch.device("cpu")), np.zeros((IDS, IDS), dtype=np.int64)
    draft = PromptLookup() if how == "lookup" else TableDraft(DRAFTS[how], sampling)
    propose = draft.propose if isinstance(draft, TableDraft) else repeated
    states = [span_of(PENALTIES, PROMPT, choice).state for choice in range(1500)]
    going = states
    while going:
        spans = []
        for state, tokens in zip(going, propose(going, 2), strict=True):
            for place, token in enumerate(tokens):
                state.suggest(state.num_tokens + place, token)
            spans.append(Span(state, state.num_tokens - 1, state.num_tokens + 2, True, verify=2))
        logits = TARGET.after([part for span in spans for part in span.parts])
        for state, drawn in zip(going, sampling.verify(logits, spans, draft), strict=True):  # type: ignore[arg-type]
            state.put_tokens(state.num_tokens, drawn)
        going = [state for state in going if state.num_tokens < len(PROMPT) + 2]
    pairs = np.array([state.tokens[len(PROMPT) : len(PROMPT) + 2] for state in states])
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    compare(counts, exact(TARGET, PENALTIES))


def test_streams_are_independent_and_numbers_uniform() -> None:
    keys = [sequence_key(7, choice) for choice in range(20_000)]
    assert len({*keys, *(stream_key(key, DRAFT) for key in keys)}) == 40_000
    numbers = uniforms(keys, [5] * len(keys))
    assert 0.0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1.0
    assert p_value(np.bincount((numbers * 50).astype(int), minlength=50), np.full(50, 0.02)) > LEAST_P
    others = uniforms([stream_key(key, DRAFT) for key in keys], [5] * len(keys))
    assert abs(np.corrcoef(numbers, others)[0, 1]) < 0.03
    low = (position_keys(keys, [5] * len(keys)).astype(np.int64) & 0xFFFFFFFF)[:, 1] >> 21
    assert (low == (numbers * 2048).astype(np.int64)).all(), "the upper bits of the same key"


# --- in the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in test_speculative."""
    made = make_model(tmp_path_factory.mktemp("rejection") / "m", "qwen3", vocab_size=VOCAB)
    other = make_model(made.path.parent / "other", "llama", vocab_size=VOCAB)
    for path in (made.path, other.path):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / name, path)
    return made.path


@pytest.fixture(scope="module")
def load(model: Path) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def load(**settings: Any) -> LLM:
        usual: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_memory": "4MiB", "max_model_len": MAX_LEN}
        usual |= {"speculative_pace": "fixed", "speculative_acceptance": "rejection"}
        if settings.get("draft_model") == "other":
            settings["draft_model"] = str(model.parent / "other")
        if "blocks" in settings:
            settings["kv_memory"] = settings.pop("blocks") * made[0].runner.pool.bytes_per_block * (1 + ("draft_model" in settings))
        made.append(LLM(str(model), **usual | settings))
        return made[-1]

    yield load
    for llm in made:
        llm.close()


@pytest.mark.parametrize("how", ["itself", "other", "lookup"])
def test_the_engine_draws_from_the_targets_distribution(load: Callable[..., LLM], model: Path, how: str) -> None:
    """The first three tokens of outputs with four tokens to choose from, so that they repeat themselves."""
    settings: dict[str, Any] = {"speculative": "lookup"}
    if how != "lookup":
        settings = {"speculative": "draft", "draft_model": str(model) if how == "itself" else how}
    llm = load(**settings, speculative_tokens=2, max_num_seqs=200)
    params = SamplingParams(
        max_tokens=4, n=200, top_k=4, temperature=9.0, logprobs=0, logit_bias=dict.fromkeys((5, 6, 7, 8), 200.0)
    )
    counts: dict[tuple[int, ...], int] = {}
    told: dict[tuple[int, ...], dict[int, float]] = {}
    for seed in range(6):
        for output in llm.generate([[5, 6, 7, 8, 5]], replace(params, seed=seed), ignore_eos=True)[0].outputs:
            ids = tuple(output.token_ids)
            counts[ids[:3]] = counts.get(ids[:3], 0) + 1
            for place in range(3):
                told.setdefault(ids[:place], {})[ids[place]] = math.exp(output.logprobs[place].logprob / 9.0)
    chances = {}
    for ids in itertools.product((5, 6, 7, 8), repeat=3):
        each = [told[ids[:place]][ids[place]] / sum(told[ids[:place]].values()) for place in range(3)]
        chances[ids] = math.prod(each)
    assert sum(counts.values()) == 1200
    assert llm.batcher.counters.proposed > 500
    assert p_value(np.array([counts.get(ids, 0) for ids in chances]), np.array(list(chances.values()))) > LEAST_P


HARD: list[dict[str, Any]] = [{}, {"tp": 2, "pp": 2}, {"pp": 2}, {"blocks": 11, "max_num_seqs": 5}]


@pytest.mark.parametrize(
    ("how", "settings"), [*(("itself", settings) for settings in HARD), ("other", {}), ("lookup", {}), ("lookup", HARD[1])]
)
def test_it_repeats_itself_and_greedy_outputs_are_the_coupled_ones(
    load: Callable[..., LLM], model: Path, how: str, settings: dict[str, Any]
) -> None:
    draft = {"speculative": "draft", "draft_model": str(model) if how == "itself" else how}
    drafter: dict[str, Any] = {"speculative": "lookup"} if how == "lookup" else draft
    prompts, params = requests(40, 11)
    llm = load(**drafter, **settings)
    given = llm.generate(prompts, params, ignore_eos=True)
    greedy = [i for i, p in enumerate(params) if p.temperature == 0.0]
    assert 10 < len(greedy) < 30
    coupled = load(speculative_acceptance="coupled", **drafter, **settings)
    wanted = coupled.generate(prompts, params, ignore_eos=True)
    check([given[i] for i in greedy], [wanted[i] for i in greedy])
    for completion, own in zip(given, params, strict=True):
        assert len(completion.outputs) == own.n
        for output in completion.outputs:
            assert own.min_tokens < own.max_tokens or output.finish_reason == "length"
            assert len(output.token_ids) >= min(own.min_tokens, own.max_tokens)
            assert len(output.logprobs) == (len(output.token_ids) if own.logprobs is not None else 0)
            assert not set(output.token_ids[:-1]) & set(own.stop_token_ids)
    counters = llm.batcher.counters
    assert counters.proposed > (0 if how == "lookup" else 200)
    if how == "itself":
        assert counters.accepted > 0.97 * counters.proposed, "p and q are the same but for rounding"
    llm.batcher.check_integrity()
    if "blocks" not in settings:
        again = load(**drafter, **settings)
        check(again.generate(prompts, params, ignore_eos=True), given)


def test_what_is_not_known_any_more_is_not_looked_at(load: Callable[..., LLM], model: Path) -> None:
    llm = load(speculative="draft", draft_model=str(model))
    drafter = llm.runner._drafter
    assert isinstance(drafter, DraftModel)
    params = SamplingParams(seed=4, max_tokens=30)
    propose = drafter.propose

    def forgetful(spans: Some[Span]) -> list[list[int]]:
        found = propose(spans)
        drafter._drawn.clear()
        return found

    drafter.propose = forgetful  # type: ignore[method-assign]
    given = llm.generate([[4, 5, 6]], params, ignore_eos=True)
    assert llm.batcher.counters.proposed > 50
    assert llm.batcher.counters.accepted == 0
    plain = load(speculative_acceptance="coupled")
    check(given, plain.generate([[4, 5, 6]], params, ignore_eos=True))


def test_nothing_is_kept_of_sequences_that_have_gone(load: Callable[..., LLM], model: Path) -> None:
    llm = load(speculative="draft", draft_model=str(model))
    drafter = llm.runner._drafter
    assert isinstance(drafter, DraftModel)
    rng = random.Random(5)
    for _ in range(3):
        prompts = [[rng.randrange(VOCAB) for _ in range(5)] for _ in range(8)]
        llm.generate(prompts, SamplingParams(seed=1, max_tokens=12), ignore_eos=True)
        assert len(drafter._drawn) <= 8, "those of the last plan are told of with the next one"
