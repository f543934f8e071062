"""How much is proposed: what pays, tries where nothing does, and a share for prompts."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.acceptance import Acceptance
from cluster.batcher import Batcher
from cluster.config import BatchConfig
from cluster.cost import StepCost
from cluster.launched import Launched
from cluster.pass_cost import PassCost
from cluster.protocol import Chunk, ChunkResult, StepPlan, StepResult
from cluster.request import Scoring, Sequence
from cluster.speculation import Speculation
from kv.manager import KVManager
from tests.cluster.messages import BATCH, request

CONFIG = dataclasses.replace(BATCH, speculative_tokens=4, num_blocks=4000, max_model_len=4000)
FIXED_S, TOKEN_S = 0.01, 0.001


def ran(speculation: Speculation, tokens: int, seconds: float, passes: tuple[tuple[int, float], ...] = ()) -> None:
    """An iteration of so many decodes."""
    chunks = [Chunk(seq, 5, 1, [], [], sample=True) for seq in range(tokens)]
    plan = StepPlan(epoch=0, step=0, admitted=[], chunks=chunks, copies=[], finished=[])
    draft_s = sum(s for _, s in passes)
    result = StepResult(epoch=0, step=0, results=[], compute_s=seconds + draft_s, draft_s=draft_s, draft_passes=list(passes))
    speculation.ran(Launched(plan, tuple(sequence() for _ in chunks)), result)


def speculating(stood: int = 3, fixed_s: float = FIXED_S, token_s: float = TOKEN_S) -> Speculation:
    """Knows what iterations cost, and that of four proposals so many stand."""
    made = Speculation(CONFIG, StepCost())
    for tokens in (*range(1, 9), 16, 64, 256, 640):
        for _ in range(3):
            ran(made, tokens, fixed_s + token_s * tokens)
    for _ in range(300):
        made.verified(sequence(), 4, stood)
    return made


def sequence(max_tokens: int = 3000, **params: Any) -> Sequence:
    asked = request(max_tokens=max_tokens)
    for name, value in params.items():
        setattr(asked.params, name, value)
    made = Sequence(0, asked, 0, [], 0.0, Scoring(1, 0))
    made.num_computed = made.num_tokens
    return made


def wanted(speculation: Speculation, *sequences: Sequence) -> list[int]:
    speculation.begin(sequences, len(sequences))
    return [speculation.wanted(each) for each in sequences]


@pytest.mark.parametrize(("stood", "count"), [(4, 4), (3, 4), (1, 2), (0, 0)])
def test_as_much_as_is_likely_to_stand_is_proposed(stood: int, count: int) -> None:
    speculation, one = speculating(stood), sequence()
    speculation._purse_s = -math.inf  # nobody tries
    assert wanted(speculation, one) == [count]


@given(st.integers(0, 4), st.floats(0.001, 0.1), st.floats(0.00001, 0.02), st.integers(1, 64), st.floats(0, 0.02))
def test_the_most_tokens_a_second(stood: int, fixed_s: float, token_s: float, decodes: int, draft_s: float) -> None:
    """By brute force: of all counts that everybody alike could have, the one that the formula says, or one as good within 2 %."""
    speculation = Speculation(CONFIG, StepCost())
    for tokens in {decodes * (1 + count) for count in range(5)}:
        for _ in range(5):
            ran(speculation, tokens, fixed_s + token_s * tokens, ((tokens, draft_s),) if draft_s else ())
    others = [sequence() for _ in range(decodes)]
    for each in others:
        each.speculated.read = each.num_tokens
        for _ in range(40):
            speculation.verified(each, 4, stood)
    speculation._purse_s = -math.inf  # nobody tries
    rate = round(others[0].speculated.rate(speculation._usual) * 32) / 32

    def speed(count: int) -> float:
        brought = decodes * sum(rate**n for n in range(count + 1))
        return brought / (fixed_s + token_s * decodes * (1 + count) + count * draft_s)

    asked = wanted(speculation, *others)
    assert len(set(asked)) == 1
    assert speed(asked[0]) * 1.0201 >= max(speed(count) for count in range(5))


def test_the_larger_the_batch_the_less_pays() -> None:
    asked = [wanted(speculating(), *(sequence() for _ in range(decodes)))[-1] for decodes in (1, 4, 16, 64, 128)]
    assert asked == sorted(asked, reverse=True)
    assert (asked[0], asked[-1]) == (4, 0)


def test_those_whose_tokens_stand_have_more_proposed() -> None:
    speculation = speculating()
    crowd = [sequence() for _ in range(8)]
    for number, each in enumerate(crowd):
        for _ in range(40):
            each.speculated.observe(4, 4 if number < 2 else 0)
    asked = wanted(speculation, *crowd)
    assert asked[:2] == [4, 4]
    assert sum(1 for count in asked[2:] if count) <= 1, "one may try"


def test_an_expensive_draft_proposes_less_but_what_was_paid_for_is_judged_by_verifying() -> None:
    speculation, one = speculating(2), sequence()
    speculation._purse_s = -math.inf
    assert wanted(speculation, one) == [4]
    for _ in range(20):
        ran(speculation, 1, FIXED_S + TOKEN_S, ((1, 0.006), (2, 0.006)))
    assert 0 <= wanted(speculation, one)[0] < 4
    one.speculated.trying, one.proposed = False, [1, 2, 3, 4]
    speculation.verified(sequence(), 4, 2)
    speculation.begin([one], 1)
    assert len(speculation.kept(one)) == 4


def test_a_draft_reads_a_long_beginning_only_where_the_rest_pays_for_it() -> None:
    speculation = speculating()
    speculation._purse_s = -math.inf
    for _ in range(5):
        for tokens in (1, 2, 4000):
            ran(speculation, 1, FIXED_S + TOKEN_S, ((tokens, 0.0003 * tokens),))
    long = [sequence(2000), sequence(20)]
    for each in long:
        each.request.prompt.extend([1] * 800)
        each.num_computed = each.num_tokens
    assert wanted(speculation, long[0]) == [4]
    assert wanted(speculation, long[1]) == [0]
    long[1].speculated.read = long[1].num_tokens - 3
    assert wanted(speculation, long[1]) == [4]


@pytest.mark.parametrize(("max_tokens", "emitted", "most"), [(3000, 0, 4), (6, 0, 4), (5, 0, 3), (9, 6, 1), (9, 7, 0), (9, 9, 0)])
def test_no_more_than_there_will_be(max_tokens: int, emitted: int, most: int) -> None:
    speculation, one = speculating(4), sequence(max_tokens)
    one.emitted = [1] * emitted
    assert wanted(speculation, one) == [most]
    assert wanted(speculating(4), sequence(beam_width=2)) == [0]


def test_before_anything_is_known_a_single_sequence_tries() -> None:
    speculation = Speculation(CONFIG, StepCost())
    crowd = [sequence() for _ in range(20)]
    for _ in range(9):
        asked = wanted(speculation, *crowd)
        assert sorted(asked) == [0] * 19 + [4]
        ran(speculation, 20, 0.03)
        speculation.verified(crowd[asked.index(4)], 4, 0)
    speculation._purse_s = -math.inf
    assert sum(wanted(speculation, *crowd)) == 0


def test_where_nothing_can_be_proposed_others_try() -> None:
    speculation = Speculation(CONFIG, StepCost())
    crowd = [sequence() for _ in range(3)]
    asked = set()
    for _ in range(8):
        asked |= {number for number, count in enumerate(wanted(speculation, *crowd)) if count}
        ran(speculation, 3, 0.03)
        for each in crowd:
            each.emitted.append(7)
            each.num_computed += 1
    assert asked == {0, 1, 2}


def answer(plan: StepPlan, right: bool) -> StepResult:
    """One token for each chunk, all that were proposed standing or none; as many proposed again as are asked for."""
    results = []
    for chunk in plan.chunks:
        if chunk.sample:
            results.append(ChunkResult(chunk.seq, [5] * (1 + chunk.verify if right else 1), [], [5] * chunk.propose))
    proposing = sum(chunk.propose > 0 for chunk in plan.chunks)
    passes = [(proposing, 0.002)] * max((chunk.propose for chunk in plan.chunks), default=0)
    compute_s = FIXED_S + TOKEN_S * sum(c.num_tokens for c in plan.chunks)
    draft_s = sum(seconds for _, seconds in passes)
    return StepResult(epoch=0, step=plan.step, results=results, compute_s=compute_s + draft_s, draft_s=draft_s, draft_passes=passes)


@pytest.mark.parametrize("requests", [1, 16, 64])
def test_what_never_stands_costs_two_percent_at_most(requests: int) -> None:
    """Of the time of all iterations, by their formula; requests come and go all the while."""
    config = dataclasses.replace(CONFIG, max_num_seqs=requests, max_num_batched_tokens=512)
    b = Batcher(config, KVManager(config))
    spent = extra = 0.0
    number = 0
    for _ in range(3000):
        while len(b.running) + len(b.line.waiting) < requests:
            b.add(request(f"r{number}", prompt=5, max_tokens=100), 0.0)
            number += 1
        plan = b.schedule(0.0)
        assert plan is not None
        result = answer(plan, right=False)
        spent += result.compute_s
        extra += result.draft_s + TOKEN_S * sum(chunk.verify for chunk in plan.chunks)
        b.update(result)
    assert extra > 0.002 * spent, "it is tried now and then"
    assert extra < 0.02 * spent


def test_what_was_given_up_comes_back_when_it_stands_again() -> None:
    b = Batcher(CONFIG, KVManager(CONFIG))
    b.add(request(max_tokens=3000), 0.0)
    verified = []
    for step in range(3000):
        plan = b.schedule(0.0)
        if plan is None:
            break
        verified.append(sum(chunk.verify for chunk in plan.chunks))
        b.update(answer(plan, right=step >= 400))
    assert sum(verified[100:400]) < 30, "hardly anything is tried while nothing stands"
    assert sum(verified[-50:]) >= 150


def test_prompts_get_their_share_whatever_is_proposed() -> None:
    config = BatchConfig(num_blocks=8000, max_model_len=4000, max_num_batched_tokens=512, speculative_tokens=8)
    b = Batcher(config, KVManager(config))
    for i in range(60):
        b.add(request(f"r{i}", prompt=4, max_tokens=2000), 0.0)
    for _ in range(20):
        plan = b.schedule(0.0)
        assert plan is not None
        b.update(answer(plan, right=True))
    b.add(request("long", prompt=2000, max_tokens=2), 1.0)
    for _ in range(40):
        plan = b.schedule(1.0)
        assert plan is not None
        b.update(answer(plan, right=True))
    assert not b.has_request("long")


def test_a_rate_is_that_of_the_last_verifications() -> None:
    known = Acceptance()
    assert known.rate() == pytest.approx(0.7)
    for _ in range(50):
        known.observe(4, 4)
    assert known.rate() > 0.97
    for _ in range(50):
        known.observe(4, 0)
    assert known.rate() < 0.15
    assert Acceptance().rate(known) == pytest.approx(known.rate())


def test_a_size_costs_what_it_was_measured_to() -> None:
    cost = PassCost(StepCost())
    assert not cost.known
    assert cost.seconds(3) == math.inf
    for tokens, seconds in ((1, 1.0), (2, 3.0), (4, 2.0), (8, 4.0)):
        cost.observe(tokens, seconds)
    assert cost.seconds(1) == 1.0
    assert cost.seconds(2) == cost.seconds(3) == cost.seconds(4) == 2.5, "more tokens never take less"
    assert cost.seconds(6) == pytest.approx(3.25)
    assert cost.seconds(9) > 4.0
    assert cost.seconds(0.5) < 1.0


@given(st.lists(st.tuples(st.integers(1, 3000), st.floats(0.001, 1.0)), min_size=1, max_size=60))
def test_more_tokens_never_take_less(seen: list[tuple[int, float]]) -> None:
    cost = PassCost(StepCost())
    for tokens, seconds in seen:
        cost.observe(tokens, seconds)
    curve = [cost.seconds(tokens) for tokens in range(1, 3100)]
    assert all(before <= after + 1e-9 for before, after in itertools.pairwise(curve))
    assert 0 < curve[0] <= max(seconds for _, seconds in seen)


def test_a_pause_counts_as_four_passes_at_most_and_old_sizes_are_forgotten() -> None:
    cost = PassCost(StepCost())
    for _ in range(20):
        cost.observe(1, 1.0)
    cost.observe(1, 100.0)
    assert cost.seconds(1) < 2.0
    cost.observe(2, 3.0)
    assert cost.seconds(2) > 1.5 * cost.seconds(1)
    for _ in range(3000):
        cost.observe(1, 0.1)
    assert cost.seconds(2) < 1.5 * cost.seconds(1)


def test_the_machines_pace_is_that_of_all_sizes() -> None:
    cost = PassCost(StepCost())
    for _ in range(20):
        for tokens in (1, 8):
            cost.observe(tokens, 0.01 * tokens)
    for _ in range(60):
        cost.observe(1, 0.03)  # somebody else came
    assert cost.seconds(1) == pytest.approx(0.03, rel=0.05)
    assert cost.seconds(8) == pytest.approx(0.24, rel=0.25)


def test_a_try_that_is_dear_to_read_for_is_paid_afterwards() -> None:
    speculation, one = speculating(stood=0), sequence()
    for _ in range(5):
        for tokens in (1, 2, 4000):
            ran(speculation, 1, FIXED_S + TOKEN_S, ((tokens, 0.0003 * tokens),))
    one.request.prompt.extend([1] * 800)
    one.num_computed = one.num_tokens

    def steps_to_a_try() -> int:
        for steps in range(10_000):
            if wanted(speculation, one) != [0]:
                return steps
            ran(speculation, 1, FIXED_S + TOKEN_S)
        raise AssertionError("never again")

    speculation._purse_s = 0.0
    assert steps_to_a_try() < 500
    chunk = Chunk(0, 5, 1, [], [], sample=True)
    chunk.propose = 4
    plan = StepPlan(epoch=0, step=0, admitted=[], chunks=[chunk], copies=[], finished=[])
    read = StepResult(epoch=0, step=0, results=[], compute_s=0.251, draft_s=0.24, draft_passes=[(800, 0.24)])
    speculation.ran(Launched(plan, (one,)), read)
    one.speculated.trying = False
    assert steps_to_a_try() > 0.24 / (0.005 * (FIXED_S + TOKEN_S) * 1.2), "not before half a percent of the time has paid for it"


def test_where_every_plan_has_prompts_their_costs_tell() -> None:
    """A new request with each iteration, so none is of decodes only."""
    config = dataclasses.replace(CONFIG, max_num_seqs=16, max_num_batched_tokens=512)
    for right in (True, False):
        b = Batcher(config, KVManager(config))
        verified = plain = 0
        spent = extra = 0.0
        for step in range(800):
            b.add(request(f"r{step}", prompt=40, max_tokens=12), 0.0)
            plan = b.schedule(0.0)
            assert plan is not None
            result = answer(plan, right)
            plain += all(chunk.num_tokens == 1 + chunk.verify for chunk in plan.chunks)
            if step >= 100:
                verified += sum(chunk.verify for chunk in plan.chunks)
                spent += result.compute_s
                extra += result.draft_s + TOKEN_S * sum(chunk.verify for chunk in plan.chunks)
            b.update(result)
        assert plain == 0
        if right:
            assert verified > 700, "more than one sequence's"
        else:
            assert extra < 0.03 * spent


def test_tries_of_which_nothing_is_ever_verified_are_paid_for_too() -> None:
    """Choices that end with their first token: the draft has read their prompts for nothing."""
    b = Batcher(CONFIG, KVManager(CONFIG))
    tries = 0
    for step in range(1000):
        asked = request(f"r{step}", prompt=20, max_tokens=50)
        asked.params.stop_token_ids = (5,)
        b.add(asked, 0.0)
        plan = b.schedule(0.0)
        assert plan is not None
        tries += sum(chunk.propose > 0 for chunk in plan.chunks)
        b.update(answer(plan, right=True))
    assert tries < 250


def test_proposals_that_found_no_room_leave_no_trial_behind() -> None:
    speculation, one = speculating(stood=0), sequence()
    speculation._purse_s = 1.0
    assert wanted(speculation, one) == [4]
    one.proposed = [1, 2, 3, 4]
    speculation.begin([one], 1)
    assert speculation.kept(one) == [1, 2, 3, 4]
    assert speculation.wanted(one) == 4
    speculation.settled(one, verify=0, propose=0)
    assert not one.speculated.on_trial
    assert not one.speculated.trying
    assert one.speculated.read == 0, "it was not asked"
    other = sequence()
    assert speculation.wanted(other) == 4, "the try is another's"


def test_a_preempted_sequence_is_not_taken_for_one_that_had_nothing_proposed() -> None:
    config = dataclasses.replace(CONFIG, num_blocks=60)
    b = Batcher(config, KVManager(config))
    one = b.add(request(max_tokens=100), 0.0)
    for _ in range(3):
        plan = b.schedule(0.0)
        assert plan is not None
        b.update(answer(plan, right=True))
    assert one.speculated.trying
    b._set.preempt(one)
    assert b.schedule(0.0) is not None
    assert one.speculated.tries_from == 0
    assert one.speculated.trying
