"""How much is proposed: what pays, tries where nothing does, and a share for prompts."""

import dataclasses
from typing import Any

import pytest

from cluster.acceptance import Acceptance
from cluster.batcher import Batcher
from cluster.config import BatchConfig
from cluster.launched import Launched
from cluster.pace import Pace
from cluster.protocol import ChunkResult, StepPlan, StepResult
from cluster.request import Scoring, Sequence
from kv.manager import KVManager
from tests.cluster.messages import BATCH, request

CONFIG = dataclasses.replace(BATCH, speculative_tokens=4, num_blocks=4000, max_model_len=4000)


def pace(fixed_s: float = 0.01, token_s: float = 0.001) -> Pace:
    made = Pace(CONFIG)
    for tokens in (1, 2, 8, 64) * 30:
        made.cost.observe(tokens, fixed_s + token_s * tokens)
    return made


def sequence(max_tokens: int = 3000, **params: Any) -> Sequence:
    asked = request(max_tokens=max_tokens)
    for name, value in params.items():
        setattr(asked.params, name, value)
    return Sequence(0, asked, 0, [], 0.0, Scoring(1, 0))


def test_as_much_as_is_likely_to_stand_is_proposed() -> None:
    p, s = pace(), sequence()
    for stood, wanted in ((4, 4), (1, 3), (0, 0)):
        for _ in range(40):
            p.verified(s, 4, stood)
        assert p.wanted(s, 1) in (wanted, wanted or 1)


def test_the_larger_the_batch_the_less_pays() -> None:
    p, s = pace(), sequence()
    for _ in range(30):
        p.verified(s, 4, 3)
    asked = [p.wanted(s, decodes) for decodes in (1, 4, 16, 64, 256)]
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == 4
    assert asked[-1] == 0


def test_an_expensive_draft_proposes_less() -> None:
    p, s = pace(), sequence()
    for _ in range(30):
        p.verified(s, 4, 3)
    before = p.wanted(s, 1)
    plan = StepPlan(epoch=0, step=0, admitted=[], chunks=[], copies=[], finished=[])
    for _ in range(60):
        p.ran(Launched(plan, ()), StepResult(epoch=0, step=0, results=[], compute_s=1.01, draft_s=1.0, draft_token_s=0.006))
    assert p.wanted(s, 1) < before
    s.proposed = [1, 2, 3, 4]
    assert len(p.kept(s, 1)) == 4, "what was paid for is judged by what verifying costs"


@pytest.mark.parametrize(("max_tokens", "emitted", "most"), [(3000, 0, 4), (6, 0, 4), (5, 0, 3), (9, 6, 1), (9, 7, 0), (9, 9, 0)])
def test_no_more_than_there_will_be(max_tokens: int, emitted: int, most: int) -> None:
    p, s = pace(), sequence(max_tokens)
    s.emitted = [1] * emitted
    assert p.wanted(s, 1) == most
    assert pace().wanted(sequence(beam_width=2), 1) == 0


def answer(plan: StepPlan, right: bool) -> StepResult:
    """One token for each chunk, all that were proposed standing or none; as many proposed again as are asked for."""
    results = []
    for chunk in plan.chunks:
        if chunk.sample:
            results.append(ChunkResult(chunk.seq, [5] * (1 + chunk.verify if right else 1), [], [5] * chunk.propose))
    return StepResult(epoch=0, step=plan.step, results=results, compute_s=0.01 + 0.001 * sum(c.num_tokens for c in plan.chunks))


def test_what_was_given_up_comes_back_when_it_stands_again() -> None:
    b = Batcher(CONFIG, KVManager(CONFIG))
    b.add(request(max_tokens=3000), 0.0)
    verified = []
    for step in range(1500):
        plan = b.schedule(0.0)
        if plan is None:
            break
        verified.append(sum(chunk.verify for chunk in plan.chunks))
        b.update(answer(plan, right=step >= 400))
    assert sum(verified[100:400]) < 10, "hardly anything is tried while nothing stands"
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
        known.observe(4, 4, 0)
    assert known.rate() > 0.97
    for _ in range(50):
        known.observe(4, 0, 0)
    assert known.rate() < 0.15
    assert Acceptance().rate(known) == pytest.approx(known.rate())
