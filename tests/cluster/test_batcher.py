"""The Batcher's policy on cases small enough to follow by hand, and its invariants under random driving."""

import dataclasses
from typing import Any

import pytest
from msgspec import structs

from cluster.batcher import Batcher
from cluster.config import Batching, Reservation
from cluster.protocol import Credit, PromptScores, Request, StepPlan, TokenDelta
from kv.manager import KVManager
from tests.cluster.messages import BATCH, request, result
from tests.cluster.test_batcher_invariants import check_ownership


def batcher(**changes: Any) -> Batcher:
    config = dataclasses.replace(BATCH, **changes)
    return Batcher(config, KVManager(config))


def step(b: Batcher) -> StepPlan:
    plan = b.schedule(0.0)
    assert plan is not None
    return plan


def run(b: Batcher) -> StepPlan:
    """One iteration, there and back."""
    plan = step(b)
    b.update(result(plan))
    return plan


def chunks(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(c.seq, c.start, c.num_tokens) for c in plan.chunks]


def test_a_prompt_longer_than_the_budget_is_run_in_chunks() -> None:
    b = batcher()
    b.add(request(prompt=40), 0.0)
    plans = [run(b) for _ in range(3)]
    assert [chunks(p) for p in plans] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 8)]]
    assert [p.chunks[0].sample for p in plans] == [False, False, True]
    assert chunks(run(b)) == [(0, 40, 1)]


def test_decodes_come_before_prefills_within_the_budget() -> None:
    b = batcher()
    b.add(request("a"), 0.0)
    run(b)
    b.add(request("b", prompt=40), 1.0)
    assert chunks(run(b)) == [(0, 4, 1), (1, 0, 15)]
    assert chunks(run(b)) == [(0, 5, 1), (1, 15, 15)]


def test_first_come_first_served_even_where_a_later_one_would_fit() -> None:
    b = batcher()
    b.add(request("a", prompt=40, max_tokens=8), 0.0)
    b.add(request("b", prompt=40, max_tokens=8), 1.0)
    b.add(request("c", prompt=4), 2.0)
    admitted = [a.seq for _ in range(5) for a in run(b).admitted]
    assert admitted == [0], "b waits for room, and c behind b"


def test_choices_that_will_fork_a_prompt_are_no_backlog() -> None:
    b = batcher(max_num_seqs=1)
    b.add(request(prompt=40, n=3), 0.0)
    assert b.stats().backlog == 40
    for left in (24, 8):
        run(b)
        assert b.stats().backlog == left
    run(b)
    b.schedule(0.0)
    assert b.stats().backlog == 2, "each of the two that wait computes one token"


def test_no_more_sequences_than_allowed_run() -> None:
    b = batcher()
    for i in range(6):
        b.add(request(str(i), prompt=2), float(i))
    assert [a.seq for a in run(b).admitted] == [0, 1, 2, 3]
    assert len(b.running) == 4


def test_the_youngest_is_preempted_and_computed_again() -> None:
    b = batcher(num_blocks=7)
    for name in "ab":
        b.add(request(name, prompt=8, max_tokens=10), 0.0)
    while not b.counters.preemptions:
        run(b)
    assert [s.request.id for s in b.running] == ["a"]
    assert [s.request.id for s in b.line.waiting] == ["b"]
    victim = b.line.waiting[0]
    known, last = victim.num_tokens, victim.emitted[-1]
    while victim in b.line.waiting:
        plan = run(b)
    assert plan.admitted[0].new is None, "the workers know it already"
    assert (plan.chunks[-1].start, plan.chunks[-1].num_tokens) == (0, known)
    assert plan.chunks[-1].tokens == [last], "the token drawn last was never sent to the first stage"


def test_of_several_the_youngest_is_the_victim() -> None:
    b = batcher(num_blocks=10, max_num_batched_tokens=24)
    for name in "abc":
        b.add(request(name, prompt=8, max_tokens=16), 0.0)
    while not b.counters.preemptions:
        run(b)
    assert [s.request.id for s in b.line.waiting] == ["c"]


def test_admission_leaves_each_running_sequence_a_block_to_decode_into() -> None:
    b = batcher(max_num_batched_tokens=64)
    b.add(request("a", prompt=32), 0.0)
    b.add(request("b", prompt=32), 0.0)
    assert [a.seq for a in run(b).admitted] == [0]


def test_a_fork_waits_for_the_parents_prompt_to_be_computed_again() -> None:
    b = batcher(num_blocks=6, max_num_seqs=2, max_num_batched_tokens=32)
    b.add(request("old", prompt=8, max_tokens=8), 0.0)
    b.add(request("pair", prompt=6, max_tokens=6, n=2), 1.0)
    while not b.counters.preemptions:
        run(b)
    assert [s.request.id for s in b.line.everyone()] == ["pair", "pair"]
    plan = run(b)
    while not plan.admitted:
        plan = run(b)
    assert plan.copies == [], "copies run before the chunk that computes what they would copy"


def test_a_choice_cancelled_while_it_is_held_back_never_runs() -> None:
    b = batcher()
    b.add(request(n=2), 0.0)
    b.cancel("r", [1])
    assert b.stats().waiting == 1
    seqs = {c.seq for _ in range(4) for c in run(b).chunks}
    assert seqs == {0}


def test_credit_is_what_nobody_has_a_claim_on() -> None:
    b = batcher()
    assert b.credit() == b.capacity() == Credit(64, 5)
    b.add(request("a", prompt=30), 0.0)
    assert b.credit() == Credit(32, 4), "8 blocks are claimed by a prompt that waits"
    run(b)
    assert b.credit() == Credit(28, 4), "and one to decode into, once it runs"


def test_under_pressure_no_victim_is_in_a_launched_plan() -> None:
    b = batcher(num_blocks=8, pp=2)
    for name in "abc":
        b.add(request(name, prompt=6, max_tokens=12), 0.0)
    while b.num_sequences:
        while len(b.in_flight) < 2 and b.schedule(0.0) is not None:
            check_ownership(b)
        b.update(result(b.in_flight[0].plan))
    assert b.counters.preemptions > 0


def test_a_cancelled_sequence_frees_its_blocks_when_its_plan_returns() -> None:
    b = batcher()
    b.add(request(), 0.0)
    plan = step(b)
    b.cancel("r")
    assert not b.has_request("r")
    assert b.kv.pool.num_used == 1
    assert b.update(result(plan)) == []
    assert b.kv.pool.num_used == 0
    assert b.schedule(0.0) is None
    b.add(request("next"), 0.0)
    assert step(b).finished == [0]


def test_choices_fork_their_sibling_once_its_prompt_is_covered() -> None:
    b = batcher()
    b.add(request(prompt=7, n=3), 0.0)
    assert [a.seq for a in run(b).admitted] == [0]
    plan = run(b)
    assert [(a.seq, a.num_computed) for a in plan.admitted] == [(1, 6), (2, 6)]
    assert [a.blocks[0] for a in plan.admitted] == [b.kv.table(0)[0]] * 2
    assert plan.copies == [(b.kv.table(0)[1], b.kv.table(1)[1]), (b.kv.table(0)[1], b.kv.table(2)[1])]
    assert chunks(plan) == [(0, 7, 1), (1, 6, 1), (2, 6, 1)]


@pytest.mark.parametrize("batching", ["static", "static-skip"])
def test_choices_of_one_request_are_in_one_static_batch(batching: Batching) -> None:
    b = batcher(batching=batching)
    b.add(request(n=3, max_tokens=8), 0.0)
    run(b)
    run(b)
    assert len(b.running) == 3


def test_a_sibling_cancelled_before_its_prompt_ran_does_not_make_the_others_compute_it_each() -> None:
    b = batcher(max_num_batched_tokens=64)
    b.add(request(prompt=16, n=4), 0.0)
    b.cancel("r", [0])
    computed = 0
    while b.has_request("r"):
        computed += sum(c.num_tokens for c in run(b).chunks)
    assert computed < 2 * 16


def test_static_batch_admits_only_when_the_last_one_is_done() -> None:
    b = batcher(batching="static")
    b.add(request("a", max_tokens=1), 0.0)
    b.add(request("b", max_tokens=3), 0.0)
    run(b)
    b.add(request("c"), 1.0)
    rows = [sorted(c.seq for c in run(b).chunks) for _ in range(3)]
    assert rows == [[0, 1], [0, 1], [2]], "the finished row is computed on until the last is done"


def test_a_finished_row_of_a_static_batch_makes_room_for_one_that_is_not() -> None:
    b = batcher(batching="static", num_blocks=7)
    b.add(request("a", prompt=8, max_tokens=1), 0.0)
    b.add(request("b", prompt=8, max_tokens=12), 0.0)
    for _ in range(20):
        if b.num_sequences:
            run(b)
    assert b.num_sequences == 0


def test_every_stage_has_its_share_of_decodes() -> None:
    b = batcher(pp=4, num_blocks=65, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(8):
        b.add(request(str(i), prompt=2, max_tokens=20), 0.0)
    run(b)
    plans = [step(b) for _ in range(4)]
    assert [[c.seq for c in plan.chunks] for plan in plans] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_one_plan_more_than_stages_takes_smaller_shares() -> None:
    b = batcher(pp=2, plans_in_flight=3, num_blocks=65, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(6):
        b.add(request(str(i), prompt=2, max_tokens=20), 0.0)
    run(b)
    plans = [step(b) for _ in range(3)]
    assert [[c.seq for c in plan.chunks] for plan in plans] == [[0, 1], [2, 3], [4, 5]]


def test_a_prompt_is_cut_by_what_iterations_cost() -> None:
    def first_chunk(fixed_s: float, token_s: float) -> int:
        b = batcher(pp=4, num_blocks=300, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1024)
        for tokens in (16, 256) * 50:
            b.planner.pace.cost.observe(tokens, fixed_s + token_s * tokens)
        b.add(request("long", prompt=900, max_tokens=1), 0.0)
        (chunk,) = step(b).chunks
        return chunk.num_tokens

    assert first_chunk(0.004, 0.001) == 35  # sqrt(4 * 900 / 3)
    assert first_chunk(0.004, 1e-6) == 512, "where tokens cost nothing, cutting wins nothing"
    assert first_chunk(1e-6, 0.004) == 25, "sqrt(2 * 900 / 3): never less than two tokens' worth"


def test_those_that_decode_wait_for_a_part_of_a_long_prompt_only() -> None:
    b = batcher(num_blocks=300, max_num_seqs=4, max_num_batched_tokens=512, max_model_len=1024)
    b.add(request("short", prompt=1, max_tokens=9), -1.0)
    run(b)
    b.add(request("long", prompt=900, max_tokens=2), 1.0)
    for tokens in (16, 256) * 50:
        b.planner.pace.cost.observe(tokens, 0.004 + 0.001 * tokens)
    assert 60 < chunks(run(b))[-1][2] <= 64


@pytest.mark.parametrize(
    ("reservation", "allocated", "used", "running"), [("paged", 16, 10, 2), ("max_tokens", 40, 10, 2), ("contiguous", 64, 5, 1)]
)
def test_ledger_of_reservations(reservation: Reservation, allocated: int, used: int, running: int) -> None:
    b = batcher(reservation=reservation)
    for name in "ab":
        b.add(request(name, prompt=5, max_tokens=15), 0.0)
    run(b)
    stats = b.stats()
    assert (stats.slots_allocated, stats.slots_used, stats.running) == (allocated, used, running)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (request(prompt=60, max_tokens=5), "64 tokens"),
        (request(prompt=0), "prompt"),
        (request(max_tokens=-1), "max_tokens"),
        (request(emitted=4), "max_tokens"),
        (structs.replace(request(), finished=[True]), "finished"),
        (structs.replace(request(n=2), finished=[False]), "finished"),
    ],
)
def test_what_can_never_run_is_named(asked: Request, word: str) -> None:
    reason = batcher().why_impossible(asked)
    assert reason is not None
    assert word in reason


def scoring(prompt: int, max_tokens: int = 4, n: int = 1, scored: int = 1) -> Request:
    asked = request(prompt=prompt, max_tokens=max_tokens, n=n)
    return structs.replace(asked, params=structs.replace(asked.params, prompt_logprobs=0), scored=scored)


def scores(plan: StepPlan) -> list[tuple[int, int] | None]:
    return [chunk.scores for chunk in plan.chunks]


def told(deltas: list[TokenDelta]) -> list[tuple[int, int]]:
    """(choice, prompt position) of all log-probabilities, which messages.result makes tell their position."""
    return [(d.choice, -int(entry.logprob)) for d in deltas for entry in d.prompt_logprobs]


def test_each_chunk_of_a_prompt_is_asked_for_the_positions_after_its_own() -> None:
    b = batcher()
    b.add(scoring(40), 0.0)
    plans = [run(b) for _ in range(4)]
    assert [scores(plan) for plan in plans] == [[(1, 17)], [(17, 33)], [(33, 40)], [None]]


def test_an_attempt_goes_on_where_the_last_one_ended() -> None:
    b = batcher()
    b.add(scoring(40, scored=20), 0.0)
    assert [scores(run(b)) for _ in range(3)] == [[None], [(20, 33)], [(33, 40)]]
    b.add(structs.replace(scoring(40, scored=40), id="other"), 1.0)
    assert all(s is None for _ in range(4) for s in scores(run(b)))


@pytest.mark.parametrize("reservation", ["paged", "max_tokens"])
def test_one_choice_tells_for_all(reservation: Reservation) -> None:
    """Also where the others compute the prompt themselves."""
    b = batcher(reservation=reservation)
    b.add(scoring(12, n=2), 0.0)
    deltas: list[TokenDelta] = []
    while b.num_sequences:
        plan = step(b)
        deltas += b.update(result(plan))
    assert told(deltas) == [(0, position) for position in range(1, 12)]
    first = next(i for i, d in enumerate(deltas) if d.tokens)
    assert not any(d.prompt_logprobs for d in deltas[first + 1 :]), "before any token"


def test_a_prompt_preempted_in_its_middle_is_told_once() -> None:
    b = batcher(num_blocks=13, max_num_seqs=2, max_num_batched_tokens=2)
    b.add(request("old", prompt=2, max_tokens=44), 0.0)
    deltas = b.update(result(step(b)))
    b.add(structs.replace(scoring(40), id="young"), 1.0)
    preempted_at: list[int] = []
    young = next(s for s in b.line.everyone() if s.request.id == "young")
    while b.num_sequences:
        before = young.num_computed
        plan = step(b)
        if young.num_computed < before:
            preempted_at.append(before)
        deltas += b.update(result(plan))
    assert any(0 < computed < 40 for computed in preempted_at), "the case this is about"
    assert told(deltas) == [(0, position) for position in range(1, 40)]


def test_a_cancelled_choice_leaves_the_prompt_to_its_sibling() -> None:
    b = batcher(pp=2, reservation="max_tokens")
    b.add(scoring(24, n=2), 0.0)
    first, second = step(b), step(b)
    b.cancel("r", [0])
    deltas = [*b.update(result(first)), *b.update(result(second))]
    while b.num_sequences:
        deltas += b.update(result(step(b)))
    assert [position for _, position in told(deltas)] == list(range(1, 24))


@pytest.mark.parametrize("prompt", [1, 2, 40])
@pytest.mark.parametrize("n", [1, 2])
def test_nothing_is_drawn_where_only_the_prompt_is_asked_about(prompt: int, n: int) -> None:
    b = batcher()
    b.add(scoring(prompt, max_tokens=0, n=n), 0.0)
    deltas: list[TokenDelta] = []
    computed = 0
    while b.num_sequences:
        plan = step(b)
        assert not any(chunk.sample for chunk in plan.chunks)
        computed += sum(chunk.num_tokens for chunk in plan.chunks)
        deltas += b.update(result(plan))
    assert told(deltas) == [(0, position) for position in range(1, prompt)]
    assert sorted(d.choice for d in deltas if d.finish == "length") == list(range(n))
    assert not any(d.tokens for d in deltas)
    assert computed == prompt  # once for all choices
    assert b.kv.pool.num_used == 0


def test_a_prompt_that_is_to_be_told_of_is_computed_whole() -> None:
    b = batcher(prefix_cache="on")
    for number, scored in enumerate((1, 1, 12)):
        b.add(structs.replace(scoring(12, scored=scored), id=f"r{number}"), float(number))
        plan = step(b)
        assert [(c.start, c.num_tokens) for c in plan.chunks] == ([(0, 12)] if scored < 12 else [(11, 1)])
        b.update(result(plan))
        b.cancel(f"r{number}")


def test_a_result_must_tell_what_was_asked() -> None:
    b = batcher()
    b.add(scoring(8), 0.0)
    plan = step(b)
    good = result(plan)
    assert b.expects(good)
    (entry,) = good.scores
    for wrong in (
        [],
        [entry, entry],
        [PromptScores(entry.seq, 2, entry.logprobs)],
        [PromptScores(entry.seq, 1, entry.logprobs[1:])],
    ):
        assert not b.expects(structs.replace(good, scores=wrong))


def test_idle_blocks_that_a_prompt_shares_are_not_counted_as_free_besides() -> None:
    """A pool of 6 blocks: 4 are an idle prefix, one is a running sequence's, which has a claim on the last. Who has that prefix and
    needs another block must wait, though 5 can be had and 4 of its 5 are there."""
    b = batcher(num_blocks=7, prefix_cache="on", max_num_batched_tokens=64)
    b.add(request("stem", 16, 0), 0.0)
    b.update(result(step(b)))
    other = request("other", 3, 9)
    other.prompt[:] = [50, 51, 52]
    b.add(other, 1.0)
    b.update(result(step(b)))
    b.add(request("next", 20, 1), 2.0)
    assert (b.kv.pool.num_held, b.kv.num_free) == (1, 5)
    plan = step(b)
    assert (plan.admitted, len(b.line)) == ([], 1)
    b.update(result(plan))
    b.cancel("other")
    (admission,) = step(b).admitted
    assert admission.num_computed == 16
