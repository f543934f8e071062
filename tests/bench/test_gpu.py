"""bench.gpu's judgement: near-ties apart from wrong tokens, repetitions whole, sides named by what they really run."""

import itertools
import math

import pytest
import torch

from bench.contenders import Contender
from bench.gpu import NEAR_TIE, Checked, Difference, Verdict, difference
from bench.gpu_sides import Side, build, compare, rows
from bench.workload import Job


def checked(behind: float) -> Checked:
    """Tokens 1, 2, 3; at the second, token 0 is so far behind."""
    logits = torch.zeros(3, 5)
    logits[[0, 1, 2], [1, 2, 3]] = 9.0
    logits[1, 0] = 9.0 - behind
    return Checked([7], [1, 2, 3], logits)


def test_only_a_token_that_is_no_near_tie_is_wrong() -> None:
    near, far = difference([1, 0, 4], checked(NEAR_TIE / 4)), difference([1, 0, 3], checked(NEAR_TIE * 4))
    assert difference([1, 2, 3], checked(0.0)) is None
    assert near is not None
    assert (near.at, near.near_tie) == (1, True)
    assert far is not None
    assert (far.at, far.near_tie) == (1, False)
    # Transformers' two best are close, but ours is a third one.
    assert difference([1, 4, 3], checked(0.0)) == Difference(1, 9.0)
    verdict = Verdict()
    for found in (None, near, far, None):
        verdict.add(found)
    assert verdict == Verdict(same=2, near_ties=1, wrong=1)
    assert str(verdict + Verdict(same=1)) == "3 of 5, 1 more up to a near-tie"
    assert str(Verdict(same=8)) == "8 of 8"


def sides(**failing: int) -> list[Side]:
    """Ours and a peer, which give the repetition's number; a side fails in the repetition that is named."""

    def make(name: str) -> Side:
        def generate(jobs: list[Job]) -> list[list[int]]:
            if jobs[0].prompt[0] == failing.get(name):
                raise MemoryError("full")
            return [job.prompt for job in jobs]

        return Side(Contender(name, generate), 0.0)  # type: ignore[arg-type]

    return [make("rayline"), make("peer")]


def work(repetition: int) -> list[Job]:
    return [Job([repetition], 1)]


def test_a_repetition_is_for_all_sides_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    both = sides()
    ticks = itertools.count()
    monkeypatch.setattr("bench.gpu_sides.time.monotonic", lambda: next(ticks))
    compare(both, work, 9, until=2)  # looked at before the second to the fourth: 0, 1, 2
    assert [len(side.contender.wall) for side in both] == [3, 3]
    assert [line[7] for line in rows(both, "S", "float32", 1, 1)] == [1, 1]
    compare(both, work, 9, until=-math.inf)
    assert [len(side.contender.wall) for side in both] == [4, 4]


@pytest.mark.parametrize("name", ["rayline", "peer"])
def test_a_side_that_fails_is_compared_with_nothing(name: str) -> None:
    both = sides(**{name: 2})
    compare(both, work, 3, until=math.inf)
    lines = list(rows(both, "S", "float32", 1, 1))
    failed, other = lines if name == "rayline" else lines[::-1]
    assert failed[4:] == ["MemoryError: full", None, None, None, None, None]
    assert other[7] == (None if name == "rayline" else 1)


def test_a_side_says_what_it_chose() -> None:
    said: list[str] = []
    makers = {"plain": lambda: sides()[1].contender, "peer": lambda: Contender("any", lambda jobs: [[0] for _ in jobs], how="sdpa")}
    assert [side.contender.name for side in build(makers, work(0), said.append)] == ["plain", "peer (sdpa)"]
    assert said == []
