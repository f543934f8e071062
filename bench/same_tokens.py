"""The same requests on every grid: do they give the same tokens?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.clients import body
from bench.workload import Shape, jobs

OUTPUT_TOKENS = 24
_LENGTHS = (1, 7, 16, 17, 100, 384)
_SALT = 1_000_003


def lengths(max_model_len: int, budget: int) -> list[int]:
    """Prompt lengths that fit; the longest is cut into chunks where it can be. `budget`: the most tokens of an iteration."""
    longest = max_model_len - OUTPUT_TOKENS
    wanted = [*_LENGTHS, min(longest, 2 * budget + 7)]
    return sorted({length for length in wanted if 1 <= length <= longest})


def requests(max_model_len: int, budget: int, vocab_size: int) -> list[dict[str, Any]]:
    """For each length one greedy request and one that draws from a seed."""
    made = jobs([Shape(length, OUTPUT_TOKENS) for length in lengths(max_model_len, budget)], vocab_size, _SALT)
    drawn = {"temperature": 1.0, "top_p": 0.95}
    return [asked for i, job in enumerate(made) for asked in (body(job), body(job, **drawn, seed=i))]


@dataclass(frozen=True)
class Comparison:
    """Tokens of the same requests, against those of the first grid."""

    requests: int
    positions: int
    """Tokens compared."""
    requests_differing: int
    differing: int
    """Positions whose tokens differ. After a first one nearly all do: what follows depends on what was drawn."""
    first: str
    """Where the first difference is; empty where there is none."""


def compare(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Comparison:
    """Answers by request, in the same order."""
    differing, requests_differing, first = 0, 0, ""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        wrong = [i for i in range(max(len(ours), len(theirs))) if ours[i : i + 1] != theirs[i : i + 1]]
        if wrong and not first:
            first = f"request {number}, token {wrong[0]}"
        differing += len(wrong)
        requests_differing += bool(wrong)
    return Comparison(len(expected), sum(len(tokens) for tokens in expected), requests_differing, differing, first)
