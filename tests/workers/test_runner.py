"""The runner's side of the step protocol."""

import pytest

from cluster.protocol import Admission, Chunk, NewSequence, StepPlan
from tests.workers.driver import Driver, greedy
from tests.workers.models import TinyModel, prompt
from workers.runner import ModelRunner
from workers.sequences import PlanError


@pytest.fixture
def runner(tiny_models: dict[str, TinyModel]) -> ModelRunner:
    return tiny_models["llama"].runner()


def plan(**parts: object) -> StepPlan:
    return StepPlan(**{"epoch": 4, "step": 9, "admitted": [], "chunks": [], "copies": [], "finished": [], **parts})  # type: ignore[arg-type]


def new(ids: list[int], **changes: object) -> NewSequence:
    return NewSequence(choice=0, prompt=ids, emitted=[], params=greedy(**changes))


def test_results_name_plan_and_sequences_in_chunk_order(runner: ModelRunner) -> None:
    admitted = [Admission(seq, 0, [], new(prompt(5, seq))) for seq in (7, 2, 5)]
    chunks = [Chunk(5, 0, 5, [1], [], True), Chunk(2, 0, 3, [2], [], False), Chunk(7, 0, 5, [3], [], True)]
    result = runner.execute(plan(admitted=admitted, chunks=chunks))
    assert (result.epoch, result.step, result.error) == (4, 9, None)
    assert [(r.seq, len(r.tokens), r.logprobs) for r in result.results] == [(5, 1, []), (7, 1, [])]
    assert result.compute_s > 0


def test_a_plan_without_chunks_or_draws_gives_no_results(runner: ModelRunner) -> None:
    assert runner.execute(plan()).results == []
    admitted = [Admission(1, 0, [], new(prompt(12)))]
    assert runner.execute(plan(admitted=admitted, chunks=[Chunk(1, 0, 7, [4], [], False)])).results == []
    assert runner.execute(plan(finished=[1])).results == []


def test_drawn_tokens_need_not_be_sent_back_but_may_be(runner: ModelRunner) -> None:
    driver = Driver(runner)
    driver.add(0, prompt(6), greedy())
    driver.run([0], 6)
    runner.reset()
    first = runner.execute(plan(admitted=[Admission(1, 0, [], new(prompt(6)))], chunks=[Chunk(1, 0, 6, [5], [], True)]))
    tokens = [*first.results[0].tokens]
    for position in range(6, 11):
        blocks = [6] if position == 8 else []
        result = runner.execute(plan(chunks=[Chunk(1, position, 1, blocks, [tokens[-1]], True)]))
        tokens += result.results[0].tokens
    assert tokens == driver.sequences[0].output


def test_a_prefix_in_the_pool_is_not_computed_again(runner: ModelRunner) -> None:
    ids = prompt(30)
    driver = Driver(runner)
    driver.add(0, ids, greedy())
    driver.run([0], 8)
    blocks = driver.sequences[0].blocks
    shared = Admission(1, 24, blocks[:3], new(ids))
    result = runner.execute(plan(admitted=[shared], chunks=[Chunk(1, 24, 6, [driver.free.pop()], [], True)]))
    assert result.results[0].tokens == driver.sequences[0].output[:1]


def test_copies_run_before_the_chunks(runner: ModelRunner) -> None:
    ids = prompt(16)
    whole = runner.execute(plan(admitted=[Admission(0, 0, [], new(ids))], chunks=[Chunk(0, 0, 16, [1, 2], [], True)]))
    fork = Admission(1, 13, [1, 9], new(ids))
    forked = runner.execute(plan(admitted=[fork], copies=[(2, 9)], chunks=[Chunk(1, 13, 3, [], [], True)]))
    assert forked.results[0].tokens == whole.results[0].tokens


def test_a_plan_that_does_not_follow_raises(runner: ModelRunner) -> None:
    with pytest.raises(PlanError, match="not known"):
        runner.execute(plan(chunks=[Chunk(3, 0, 1, [1], [], True)]))
    with pytest.raises(PlanError, match="fit"):
        runner.execute(plan(admitted=[Admission(3, 0, [], new(prompt(12)))], chunks=[Chunk(3, 0, 12, [1], [], True)]))


def test_reset_forgets_all_sequences(runner: ModelRunner) -> None:
    runner.execute(plan(admitted=[Admission(3, 0, [], new(prompt(4)))], chunks=[Chunk(3, 0, 4, [1], [], True)]))
    runner.reset()
    with pytest.raises(PlanError, match="not known"):
        runner.execute(plan(chunks=[Chunk(3, 4, 1, [], [], True)]))


def test_the_null_block_is_never_written(runner: ModelRunner) -> None:
    driver = Driver(runner)
    for seq in range(5):
        driver.add(seq, prompt(3 + 4 * seq), greedy())
    driver.run(list(range(5)), 9, chunk=6)
    assert not runner.pool.keys[:, 0].any()
    assert not runner.pool.values[:, 0].any()
