"""The cost of iterations is learnt from what they took, and the chunk that follows from it is the best there is."""

import random

import pytest

from cluster.cost import StepCost


def learnt(fixed_s: float, token_s: float, noise: float = 0.0) -> StepCost:
    cost, rng = StepCost(), random.Random(1)
    for _ in range(300):
        tokens = rng.choice([4, 16, 16, 64, 200])
        cost.observe(tokens, (fixed_s + token_s * tokens) * (1 + noise * rng.uniform(-1, 1)))
    return cost


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.004, 0.001), (0.0025, 0.00001), (0.015, 0.007)])
def test_the_ratio_is_found(fixed_s: float, token_s: float) -> None:
    assert learnt(fixed_s, token_s).fixed_tokens == pytest.approx(fixed_s / token_s)
    assert learnt(fixed_s, token_s, noise=0.05).fixed_tokens == pytest.approx(fixed_s / token_s, rel=0.6)


def test_what_cannot_be_told_is_guessed() -> None:
    cost = StepCost()
    guess = cost.fixed_tokens
    for _ in range(50):
        cost.observe(16, 0.01)
    assert cost.fixed_tokens == guess, "one size tells nothing"
    for tokens in (8, 256, 8, 256):
        cost.observe(tokens, 0.0)
    assert cost.fixed_tokens == guess, "no time at all"
    later = learnt(1.0, 1e-6)
    assert later.fixed_tokens == 1024.0


def test_old_times_fade() -> None:
    cost = learnt(0.1, 0.001)
    rng = random.Random(2)
    for _ in range(2000):
        tokens = rng.choice([4, 64, 200])
        cost.observe(tokens, 0.005 + 0.001 * tokens)
    assert cost.fixed_tokens == pytest.approx(5.0, rel=0.01)


def test_one_that_took_far_too_long_bends_nothing() -> None:
    cost = learnt(0.004, 0.001)
    cost.observe(16, 60.0)
    assert cost.fixed_tokens == pytest.approx(4.0, rel=0.3)


def makespan(total: int, chunk: int, stages: int, fixed_s: float, token_s: float) -> float:
    """Chunks through stages, one after the other in each."""
    ends = [0.0] * stages
    while total > 0:
        size = min(chunk, total)
        total -= size
        before = 0.0
        for stage in range(stages):
            before = ends[stage] = max(before, ends[stage]) + fixed_s + token_s * size
    return ends[-1]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.004, 0.001), (0.0025, 0.00002)])
def test_the_chunk_is_nearly_the_best(stages: int, fixed_s: float, token_s: float) -> None:
    chosen = learnt(fixed_s, token_s).chunk(2048, stages)
    best = min(makespan(2048, chunk, stages, fixed_s, token_s) for chunk in range(1, 2049))
    assert makespan(2048, chosen, stages, fixed_s, token_s) < 1.08 * best


def test_prompts_beside_decodes_keep_the_fixed_part_small() -> None:
    assert learnt(0.006, 0.001).beside_decodes in (96, 97)
    assert learnt(1e-6, 0.001).beside_decodes == 64
    assert StepCost().beside_decodes == 512, "a guess that cuts nothing before anything is known"
