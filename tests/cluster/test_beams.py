"""Beam search: the search itself against one that forgets nothing, and its group's life in the engine."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.batcher import Batcher
from cluster.beams import BeamSearch, Hypothesis
from cluster.config import BatchConfig
from cluster.protocol import Request, SamplingParams, StepPlan, TokenDelta, TokenLogprobs
from cluster.structs import replace
from kv.manager import KVManager
from tests.cluster.messages import request
from tests.conftest import examples
from workers.fake import FakeStage, fake_beams
from workers.sequences import PlanError, SequenceTable

Output = tuple[float, tuple[int, ...]]


class Model:
    """Log-probabilities of a small vocabulary after each prefix, drawn from few values, so that many are equal."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def row(self, prefix: tuple[int, ...]) -> list[float]:
        draw = random.Random(f"{self.seed} {prefix}")
        return [draw.choice([-0.5, -1.0, -1.25, -2.0, -3.0, -math.inf, math.nan]) for _ in range(self.size)]

    def told(self, prefix: tuple[int, ...], count: int) -> TokenLogprobs:
        """The likeliest, as workers tell them."""
        best = sorted((-logprob, token) for token, logprob in enumerate(self.row(prefix)) if not math.isnan(logprob))[:count]
        return TokenLogprobs(0.0, [token for _, token in best], [-minus for minus, _ in best])


def searched(model: Model, params: SamplingParams) -> list[Hypothesis]:
    """What the search finds, told no more than it needs."""
    search = BeamSearch(params)
    count = params.beam_width + len(params.stop_token_ids)
    while not search.over:
        live = [tuple(step.token for step in path.steps()) for path in search.live]
        continued = search.advance([model.told(prefix, count) for prefix in live])
        assert len(continued) == len(search.live) <= params.beam_width
        for beam, path in zip(continued, search.live, strict=True):
            assert tuple(step.token for step in path.steps()[:-1]) == live[beam]
    return search.done


def wanted(model: Model, params: SamplingParams) -> list[Output]:
    """The same by looking at every continuation of every beam, round by round, as transformers does."""
    width, stops = params.beam_width, params.stop_token_ids
    beams: list[Output] = [(0.0, ())]
    done: list[Output] = []
    for length in range(1, params.max_tokens + 1):
        every = []
        for number, (total, prefix) in enumerate(beams):
            for token, logprob in enumerate(model.row(prefix)):
                banned = token in stops and length <= params.min_tokens
                if not (banned or math.isnan(logprob) or logprob == -math.inf):
                    every.append((-(total + logprob), number, token))
        ranked = [(-minus, (*beams[number][1], token)) for minus, number, token in sorted(every)]
        ends = [prefix[-1] in stops or length == params.max_tokens for _, prefix in ranked]
        scored = [(total / length**params.length_penalty, prefix) for total, prefix in ranked]
        done += [output for output, end in zip(scored[:width], ends, strict=False) if end]
        done = sorted(done, key=lambda output: -output[0])[:width]
        going = [rank for rank, end in enumerate(ends) if not end][:width]
        beams = [ranked[rank] for rank in going]
        if not beams:
            break
        if len(done) == width and (params.early_stopping or scored[going[0]][0] <= done[-1][0]):
            break
    return done


@st.composite
def searches(draw: st.DrawFn) -> tuple[Model, SamplingParams]:
    size = draw(st.integers(1, 9))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 6)),
        beam_width=draw(st.integers(1, 6)),
        length_penalty=draw(st.sampled_from([1.0, 0.0, 2.0, -1.0, 0.3])),
        early_stopping=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.sets(st.integers(0, size - 1), max_size=3))),
        min_tokens=draw(st.sampled_from([0, 0, 2])),
    )
    return Model(draw(st.integers(0, 2**32)), size), params


@examples(400)
@given(searches())
def test_the_search_is_that_over_all_continuations(asked: tuple[Model, SamplingParams]) -> None:
    model, params = asked
    found = [(h.score, tuple(step.token for step in h.path.steps())) for h in searched(model, params)]
    assert found == wanted(model, params)
    for hypothesis in searched(model, params):
        stops = hypothesis.path.token in params.stop_token_ids
        assert hypothesis.finish == ("stop" if stops else "length")


def test_with_room_for_all_it_finds_the_best_of_all() -> None:
    model, params = Model(3, 4), SamplingParams(max_tokens=3, beam_width=64, length_penalty=0.0)
    every: list[Output] = [(0.0, ())]
    for _ in range(3):
        every = [
            (total + logprob, (*prefix, token))
            for total, prefix in every
            for token, logprob in enumerate(model.row(prefix))
            if logprob > -math.inf
        ]
    best = sorted(every, key=lambda output: (-output[0], output[1]))
    found = searched(model, params)
    assert [h.score for h in found] == [total for total, _ in best]
    assert tuple(step.token for step in found[0].path.steps()) in [prefix for total, prefix in best if total == best[0][0]]


def beams(width: int, prompt: int = 6, max_tokens: int = 8, n: int = 1, id: str = "r", **changes: object) -> Request:
    asked = request(id, prompt, max_tokens, n=n)
    asked.params = replace(asked.params, beam_width=width, **changes)
    return asked


def engine(num_blocks: int = 200, prefix_cache: str = "off", **settings: int) -> tuple[Batcher, FakeStage]:
    sizes = {"max_model_len": 600, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 1024, **settings}
    config = BatchConfig(num_blocks=num_blocks, prefix_cache=prefix_cache, **sizes)  # type: ignore[arg-type]
    return Batcher(config, KVManager(config)), FakeStage(0, 1, num_blocks, config.block_size)


def launch(batcher: Batcher, now: float = 0.0) -> StepPlan:
    plan = batcher.schedule(now)
    assert plan is not None
    return plan


def take(batcher: Batcher, stage: FakeStage, plan: StepPlan) -> list[TokenDelta]:
    result = stage.execute(plan, [])[1]
    assert result is not None
    assert batcher.expects(result)
    return batcher.update(result)


def step(batcher: Batcher, stage: FakeStage, now: float = 0.0) -> tuple[StepPlan, list[TokenDelta]]:
    plan = launch(batcher, now)
    return plan, take(batcher, stage, plan)


def outputs(batcher: Batcher, stage: FakeStage) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    while batcher.num_sequences:
        for delta in step(batcher, stage)[1]:
            found.setdefault((delta.request, delta.choice), []).extend(delta.tokens)
    batcher.check_integrity()
    assert batcher.stats().blocks_used == 0
    return found


def test_forks_are_sent_without_their_tokens() -> None:
    """6 tokens of prompt: a whole block is shared, two positions of the next one are copied."""
    batcher, stage = engine()
    batcher.add(beams(3), 0.0)
    plan, _ = step(batcher, stage)
    assert [(a.seq, a.parent, a.new is None) for a in plan.admitted] == [(0, None, False)]
    plan, _ = step(batcher, stage)
    assert [(a.seq, a.parent, a.new, a.num_computed) for a in plan.admitted] == [(1, 0, None, 6), (2, 0, None, 6)]
    first, second = batcher.kv.table(0), batcher.kv.table(1)
    assert first[0] == second[0]
    assert plan.copies == [(first[1], second[1]), (first[1], batcher.kv.table(2)[1])]
    assert [(c.seq, c.start, c.num_tokens, len(c.tokens)) for c in plan.chunks] == [(0, 6, 1, 1), (1, 6, 1, 1), (2, 6, 1, 1)]


def test_all_is_told_at_the_end_and_at_once() -> None:
    batcher, stage = engine()
    asked = beams(4, n=3, logprobs=1, stop_token_ids=(7,))
    batcher.add(asked, 0.0)
    deltas: list[TokenDelta] = []
    while not deltas:
        assert batcher.has_request("r")
        _, deltas = step(batcher, stage, now=2.0)
    assert not batcher.has_request("r")
    assert [delta.tokens for delta in deltas] == fake_beams(asked.prompt, asked.params, 1)
    for delta in deltas:
        assert (delta.index, delta.queued_s, delta.cached_tokens) == (0, 2.0, 0)
        assert [len(told.top_ids) for told in delta.logprobs] == [1] * len(delta.tokens)
        assert delta.finish == ("stop" if delta.tokens[-1] == 7 else "length")


def test_a_group_has_places_for_all_of_its_beams() -> None:
    batcher, stage = engine()
    batcher.add(beams(6), 0.0)
    for number in range(3):
        batcher.add(beams(0, id=f"other{number}", max_tokens=30), 1.0 + number)
    assert batcher.num_sequences == 9
    plan = launch(batcher)
    assert len(batcher.running) == 3, "one beam that keeps six places, and two others"
    take(batcher, stage, plan)
    launch(batcher)
    assert len(batcher.running) == 8
    assert batcher.credit().sequences == batcher.capacity().sequences - 9


def test_it_ends_when_nobody_waits_for_any_choice() -> None:
    batcher, stage = engine()
    batcher.add(beams(4, n=3), 0.0)
    for _ in range(3):
        step(batcher, stage)
    batcher.cancel("r", [0, 2])
    assert batcher.has_request("r")
    plan = launch(batcher)
    batcher.cancel("r", [1])
    assert not batcher.has_request("r")
    assert batcher.stats().blocks_used > 0, "a launched plan holds them"
    assert take(batcher, stage, plan) == []
    assert (batcher.stats().blocks_used, batcher.stats().running, batcher.num_sequences) == (0, 0, 0)


def test_only_choices_that_somebody_waits_for_are_told() -> None:
    batcher, stage = engine()
    asked = beams(4, n=3)
    asked.finished[1] = True
    batcher.add(asked, 0.0)
    found = outputs(batcher, stage)
    best = fake_beams(asked.prompt, asked.params, 1)
    assert found == {("r", 0): best[0], ("r", 2): best[2]}


@pytest.mark.parametrize("prefix_cache", ["on", "off"])
@pytest.mark.parametrize("num_blocks", [6, 9, 12, 60])
def test_a_pool_for_one_beam_is_enough(num_blocks: int, prefix_cache: str) -> None:
    """Beams that have drawn give up their blocks for the others of their round."""
    batcher, stage = engine(num_blocks, prefix_cache, max_model_len=20)
    asked = [beams(4, n=2, max_tokens=14, id="a"), beams(5, n=5, max_tokens=12, id="b"), beams(0, max_tokens=13, id="c")]
    for number, each in enumerate(asked):
        each.prompt[0] = number
        batcher.add(each, float(number))
    found = outputs(batcher, stage)
    assert (batcher.counters.preemptions > 0) == (num_blocks < 60)
    for each in asked[:2]:
        assert [found[each.id, choice] for choice in range(each.params.n)] == fake_beams(each.prompt, each.params, 1)


def test_beams_share_their_prompt() -> None:
    """8 beams after 512 tokens take not much more than one sequence; 8 requests take 8 times as much."""

    def most(requests: list[Request]) -> int:
        batcher, stage = engine(num_blocks=1200)
        for each in requests:
            batcher.add(each, 0.0)
        slots = []
        while batcher.num_sequences:
            plan = launch(batcher)
            slots.append((batcher.stats().slots_allocated, batcher.stats().slots_shared))
            take(batcher, stage, plan)
        assert max(shared for _, shared in slots) >= (7 * 512 if requests[0].params.beam_width else 0)
        return max(allocated for allocated, _ in slots)

    together = most([beams(8, prompt=512, max_tokens=32)])
    apart = most([beams(0, prompt=512, max_tokens=32, id=str(number)) for number in range(8)])
    assert apart >= 8 * 512
    assert together < 512 + 8 * 40
    assert together * 4 < apart


IMPOSSIBLE = [
    (beams(9), "the beam width"),
    (beams(2, n=3), "exceeds the beam width"),
    (beams(2, max_tokens=0), "max_tokens"),
    (beams(2, length_penalty=math.nan), "length penalty"),
    (beams(2, length_penalty=99.0), "length penalty"),
    (beams(2, logit_bias={1: 1.0}), "logit_bias"),
    (beams(2, top_p=0.5), "top_p"),
    (beams(2, frequency_penalty=0.1), "penalties"),
]


@pytest.mark.parametrize(("asked", "why"), IMPOSSIBLE)
def test_what_does_not_go_with_beams(asked: Request, why: str) -> None:
    batcher, _ = engine()
    assert why in (batcher.why_impossible(asked) or "")
    assert batcher.why_impossible(beams(8, temperature=0.0, min_tokens=3, logprobs=5, prompt_logprobs=0)) is None


@pytest.mark.parametrize("settings", [{"batching": "static"}, {"reservation": "max_tokens"}])
def test_engines_that_do_not_fork_have_no_beams(settings: dict[str, str]) -> None:
    config = BatchConfig(num_blocks=20, max_model_len=64, block_size=4, **settings)  # type: ignore[arg-type]
    assert "fork" in (Batcher(config, KVManager(config)).why_impossible(beams(2)) or "")


def test_a_fork_of_what_is_not_known_is_an_error() -> None:
    batcher, stage = engine()
    batcher.add(beams(3), 0.0)
    step(batcher, stage)
    plan = launch(batcher)
    with pytest.raises(PlanError, match="fork of 0"):
        SequenceTable(4).apply(plan)
