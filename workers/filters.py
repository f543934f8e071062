"""top_k, top_p (nucleus sampling, Holtzman et al. 2020) and min_p (Nguyen et al. 2024) as one threshold per row.

Each filter keeps the tokens whose score is at least some value, so together they keep those at or above the largest of these
values. Tokens of equal score are kept or dropped together: what is kept depends on the scores alone, not on how they were
sorted.

    top_k   the k-th largest score
    top_p   over what top_k leaves: a token stays while the tokens above it hold less than top_p of the probability
    min_p   a token stays with at least min_p times the probability of the likeliest one
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.protocol import SamplingParams
from workers.selection import largest, rows_of

_BUCKETS = 1024
_BUCKETS_PER_UNIT = 64
"""Buckets of scores in which a nucleus is looked for: 1/64 wide, the last one for all below -16."""


def thresholds(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[rows, 1] fp32: tokens with a score at or above it stay.

    scores [rows, vocab] fp32: log-probabilities up to a constant, of which the largest in each row is 0.
    """
    limits = torch.tensor([lowest_score(p) for p in params], dtype=torch.float32).to(scores.device)
    vocab = scores.shape[1]
    by_count = [i for i, p in enumerate(params) if 0 < p.top_k < vocab]
    by_mass = [i for i, p in enumerate(params) if p.top_p < 1.0 and not 0 < p.top_k < vocab]
    if by_count:
        edges = _top_k_edge(rows_of(scores, by_count), [params[i] for i in by_count])
        limits[by_count] = torch.maximum(limits[by_count], edges)
    if by_mass:
        shares = np.array([params[i].top_p for i in by_mass])
        edges = _nucleus_edge(rows_of(scores, by_mass), shares)
        limits[by_mass] = torch.maximum(limits[by_mass], edges)
    return limits[:, None]


def lowest_score(params: SamplingParams) -> float:
    """min_p as a score: tokens below it are dropped."""
    return min(0.0, math.log(params.min_p)) if params.min_p > 0 else -math.inf


def _top_k_edge(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[rows]: the smallest score that top_k, and top_p over what that leaves, let stay."""
    k = torch.tensor([p.top_k for p in params], device=scores.device)[:, None]
    shares = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=scores.device)
    top = largest(scores, max(p.top_k for p in params))
    last = top.gather(1, k - 1)
    if all(p.top_p >= 1.0 for p in params):
        return last[:, 0]
    inside = torch.arange(top.shape[1], device=scores.device) < k
    weights = torch.where(inside, top.exp(), 0.0).to(torch.float64)
    ties = (scores == last).sum(-1) - (inside & (top == last)).sum(-1)  # equal to the k-th, but not among the k
    total = weights.sum(-1) + ties * last[:, 0].exp()
    return _edge(top, weights.cumsum(-1), shares * total).maximum(last[:, 0])


def _nucleus_edge(scores: Tensor, shares: NDArray[np.float64]) -> Tensor:
    """[rows]: the smallest score inside the nucleus that holds `shares` of each row."""
    if scores.device.type == "cpu":
        return torch.from_numpy(_nucleus_edge_by_buckets(scores.numpy(), scores.exp().numpy(), shares))
    top = scores.sort(-1, descending=True).values
    mass = top.exp().to(torch.float64).cumsum(-1)
    return _edge(top, mass, torch.from_numpy(shares).to(scores.device) * mass[:, -1])


def _edge(top: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
    """[rows]: of scores in descending order, the last before which less than `wanted` has summed up.

    top [rows, n]; mass [rows, n] fp64, the cumulative weights of top; wanted [rows] fp64.
    """
    inside = (mass[:, :-1] < wanted[:, None]).sum(-1, keepdim=True)
    return top.gather(1, inside)[:, 0]


def _nucleus_edge_by_buckets(
    scores: NDArray[np.float32], weights: NDArray[np.float32], shares: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The same without sorting whole rows, which takes a CPU 0.9 ms each for 32,000 scores.

    Scores are put in buckets by size; the bucket in which the edge lies is found from the buckets' weights and sorted alone. Row by
    row: what is written for one then stays in the cache.
    """
    edges = np.empty(len(scores), dtype=np.float32)
    for number, (row, row_weights, share) in enumerate(zip(scores, weights, shares.tolist(), strict=True)):
        with np.errstate(invalid="ignore"):  # what isn't a number becomes the smallest integer, and then 0
            buckets = np.minimum(row * np.float32(-_BUCKETS_PER_UNIT), np.float32(_BUCKETS - 1)).astype(np.int64).clip(0)
        mass = np.bincount(buckets, row_weights, _BUCKETS).cumsum()
        wanted = share * mass[-1]
        bucket = int((mass >= wanted).argmax())
        members = np.sort(row[buckets == bucket])[::-1]
        above = mass[bucket - 1] if bucket else 0.0
        summed = above + np.exp(members).cumsum(dtype=np.float64)
        edges[number] = members[int((summed[:-1] < wanted).sum())]
    return edges
