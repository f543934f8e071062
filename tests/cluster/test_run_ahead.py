"""Plans that run ahead: decodes whose token the plan before still draws."""

import dataclasses
from typing import Any

import pytest

from cluster.batcher import Batcher
from cluster.config import ConfigError, batch_settings, from_mapping
from cluster.protocol import StepPlan, StepResult
from kv.manager import KVManager
from kv.names import pack
from tests.cluster.messages import BATCH, request, result
from tests.cluster.test_batcher_invariants import check_ownership


def ahead(**changes: Any) -> Batcher:
    config = dataclasses.replace(BATCH, run_ahead="on", **changes)
    return Batcher(config, KVManager(config))


def launch(b: Batcher) -> StepPlan:
    assert b.wants_plan
    plan = b.schedule(0.0)
    assert plan is not None
    check_ownership(b)
    return plan


def chunks(plan: StepPlan) -> list[tuple[int, int, int, list[int]]]:
    return [(c.seq, c.start, c.num_tokens, c.tokens) for c in plan.chunks]


def test_decodes_are_launched_before_their_token_is_known() -> None:
    b = ahead()
    b.add(request(prompt=4, max_tokens=4), 0.0)
    plans = [launch(b), launch(b)]
    assert not b.wants_plan
    assert chunks(plans[1]) == [(0, 4, 1, [])]
    given: list[int] = []
    while b.in_flight:
        given += [token for delta in b.update(result(plans[len(given)], token=50 + len(given))) for token in delta.tokens]
        while b.wants_plan and (plan := b.schedule(0.0)) is not None:
            plans.append(plan)
    assert given == [50, 51, 52, 53]
    assert [c.start for plan in plans for c in plan.chunks] == [0, 4, 5, 6], "nothing is computed after the last token"
    assert b.num_sequences == b.kv.pool.num_held == 0


def test_what_was_computed_after_a_stop_token_is_dropped() -> None:
    b = ahead(prefix_cache="on")
    asked = request(prompt=4, max_tokens=9)
    asked.params.stop_token_ids = (7,)
    b.add(asked, 0.0)
    plans = [launch(b), launch(b)]
    [delta] = b.update(result(plans[0], token=7))
    assert (delta.tokens, delta.finish) == ([7], "stop")
    assert not b.has_request(asked.id)
    assert b.kv.pool.num_held, "a plan still writes there"
    assert b.schedule(0.0) is None
    assert b.update(result(plans[1], token=8)) == []
    assert b.kv.pool.num_held == 0
    found = b.kv.match(pack([*asked.prompt, 7, 8, 9]), "")
    assert b.kv.known_tokens(found) <= 5


def test_a_cancel_under_way_keeps_only_what_is_known() -> None:
    b = ahead(prefix_cache="on", block_size=1)
    b.add(request(prompt=4, max_tokens=9), 0.0)
    plans = [launch(b), launch(b)]
    b.cancel("r")
    assert [b.update(result(plan, token=3)) for plan in plans] == [[], []]
    check_ownership(b)
    assert b.kv.pool.num_held == 0


def test_a_new_prompt_joins_the_decodes() -> None:
    b = ahead()
    b.add(request("a", prompt=4, max_tokens=9), 0.0)
    plans = [launch(b), launch(b)]
    b.add(request("b", prompt=4, max_tokens=9), 1.0)
    b.update(result(plans[0]))
    assert [c[:3] for c in chunks(launch(b))] == [(0, 5, 1), (1, 0, 4)]


def test_not_where_blocks_are_few() -> None:
    """Of sequences in flight none gives up its blocks, and the oldest must not wait for the others to end."""
    b = ahead(num_blocks=4)
    b.add(request(prompt=10, max_tokens=2), 0.0)
    launch(b)
    assert not b.wants_plan


def test_beams_are_not_run_ahead() -> None:
    b = ahead()
    asked = request(prompt=4, max_tokens=9)
    asked.params.beam_width = 2
    b.add(asked, 0.0)
    launch(b)
    assert not b.wants_plan


def test_auto_looks_at_how_long_iterations_take() -> None:
    for seconds, wanted in ((0.004, True), (0.02, False)):
        config = dataclasses.replace(BATCH, run_ahead="auto")
        b = Batcher(config, KVManager(config))
        b.add(request(prompt=4, max_tokens=40), 0.0)
        assert b.wants_plan
        for _ in range(20):
            plan = b.schedule(0.0)
            assert plan is not None
            answer: StepResult = result(plan)
            answer.compute_s = seconds
            b.update(answer)
        launch(b)
        assert b.wants_plan == wanted


@pytest.mark.parametrize("settings", [{"tp": 2}, {"pp": 2}])
def test_only_where_the_rank_that_draws_is_the_only_one(settings: dict[str, int]) -> None:
    config = from_mapping({"model": "m", **settings})
    assert not batch_settings(config, 10, 100).may_run_ahead
    assert batch_settings(from_mapping({"model": "m"}), 10, 100).may_run_ahead
    with pytest.raises(ConfigError, match="run_ahead"):
        from_mapping({"model": "m", "run_ahead": "on", **settings})
