"""Speculative sampling by rejection (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

A draft draws x from its distribution q. The target, whose own is p, accepts x with probability min(1, p(x) / q(x)), and draws from
the normalised max(0, p - q) in its place where it does not: either way the token is distributed as p. When all were accepted one
more is drawn from p.

All is counter-based: the draft's noise, the number in [0, 1) that accepts, and the noise of what is drawn in the end are three
independent streams of the position, so a run repeats itself. What is drawn does depend on what was proposed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.filters import thresholds
from workers.keys import position_keys, uniforms
from workers.logprobs import describe
from workers.noise import GumbelNoise
from workers.penalties import adjust
from workers.picker import noisiest, scaled
from workers.sampler import Draw, Sampler
from workers.sequences import Span
from workers.speculative.drafter import Drafter
from workers.speculative.verifier import Coupled


class RejectionSampling:
    """The arithmetic, for one vocabulary on one device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._noise = GumbelNoise(vocab_size, device)

    def propose(self, logits: Tensor, spans: Sequence[Span]) -> tuple[list[int], Tensor]:
        """A draft's token after each span, and the distributions [len(spans), vocab] that they were drawn from; logits as in
        distribution()."""
        chances = distribution(logits, spans)
        keys = position_keys([span.state.draws.draft_key for span in spans], [span.end for span in spans])
        return self.draw(chances, keys).tolist(), chances

    def verify(self, logits: Tensor, spans: Sequence[Span], drafter: Drafter) -> list[list[int]]:
        """The tokens that each span comes to: those accepted of the ones proposed, and one more.

        logits [n, vocab] fp32, overwritten: a row for each of the spans' parts. Where the drafter does not know any more what it
        drew from, its tokens are not looked at: one is drawn from the target's own distribution, as if nothing had been proposed.
        """
        chances = distribution(logits, [part for span in spans for part in span.parts])
        counts = np.array([span.verify for span in spans])
        proposed = np.array([token for span in spans for token in span.proposed])
        odds, known = drafter.odds(spans, chances[: len(proposed)])
        accepted, wanted = judge(chances, odds, proposed, counts, np.array(known), _numbers(spans))
        stood: list[int] = accepted.tolist()
        places = [span.end - span.verify + count for span, count in zip(spans, stood, strict=True)]
        drawn = self.draw(wanted, position_keys([span.state.draws.noise_key for span in spans], places)).tolist()
        return [[*span.proposed[:count], token] for span, count, token in zip(spans, stood, drawn, strict=True)]

    def draw(self, chances: Tensor, keys: NDArray[np.int32]) -> Tensor:
        """[n] int64: a token from each row of chances [n, vocab] fp32, which need not sum to 1, by the noise of keys [n, 2]."""
        return noisiest(self._noise, chances.log(), torch.from_numpy(keys).to(chances.device))


def judge(
    chances: Tensor,
    odds: Tensor,
    proposed: NDArray[np.int64],
    counts: NDArray[np.int64],
    known: NDArray[np.bool_],
    numbers: NDArray[np.float64],
) -> tuple[NDArray[np.int64], Tensor]:
    """How many proposed tokens of each of n sequences are accepted [n], and what the next token is to be drawn from [n, vocab].

    counts [n]: how many were proposed, each at least 1. The rest stands for one sequence after the other: chances [sum(counts) + n,
    vocab], p at each of those places and the one after; odds [sum(counts), vocab], q; proposed, and numbers in [0, 1),
    [sum(counts)]. known [n]: whether a sequence's odds are; where not, nothing is accepted.
    """
    device = chances.device
    after = np.cumsum(counts + 1) - 1  # rows of chances behind each sequence's proposed tokens
    tokens = torch.from_numpy(proposed).to(device)[:, None]
    p = chances[torch.from_numpy(np.delete(np.arange(len(chances)), after)).to(device)].gather(1, tokens)
    ours, theirs = torch.cat((p, odds.gather(1, tokens)), dim=1).double().cpu().numpy().T
    falls = np.append(np.flatnonzero(~(numbers * theirs < ours)), len(proposed))
    begin = np.cumsum(counts) - counts
    accepted = np.minimum(counts, falls[np.searchsorted(falls, begin)] - begin) * known
    wanted = chances[torch.from_numpy(after - counts + accepted).to(device)]
    fallen = np.flatnonzero((accepted < counts) & known)
    if len(fallen):
        at = torch.from_numpy(fallen).to(device)
        wanted[at] = _residual(wanted[at], odds[torch.from_numpy((begin + accepted)[fallen]).to(device)])
    return accepted, wanted


def distribution(logits: Tensor, spans: Sequence[Span]) -> Tensor:
    """[n, vocab] fp32: what the next token after each of `spans` is drawn from, penalties, bias, temperature and filters included.

    logits [n, vocab] fp32, overwritten. None of the spans may be greedy.
    """
    adjusted = [i for i, span in enumerate(spans) if span.state.draws.adjusted]
    if adjusted:
        adjust(logits, adjusted, [spans[i] for i in adjusted])
    scores = scaled(logits, spans)
    if any(span.state.draws.filtered for span in spans):
        scores.masked_fill_(scores < thresholds(scores, [span.state.params for span in spans]), -torch.inf)
    return scores.softmax(-1)


def _numbers(spans: Sequence[Span]) -> NDArray[np.float64]:
    """[n] in [0, 1): what each of the tokens that the spans verify is accepted by."""
    keys = [span.state.draws.accept_key for span in spans for _ in range(span.verify)]
    return uniforms(keys, [position for span in spans for position in range(span.end - span.verify, span.end)])


def _residual(chances: Tensor, odds: Tensor) -> Tensor:
    """[n, vocab]: max(0, p - q) of each row, not normalised; p where rounding leaves nothing of it."""
    left = (chances - odds).clamp_min_(0.0)
    return torch.where(left.amax(-1, keepdim=True) > 0, left, chances)


class Rejecting:
    """See workers.speculative.verifier.Verifier: by rejection where tokens are drawn; of greedy ones those stand that are the
    target's own."""

    def __init__(self, sampler: Sampler, drafter: Drafter, sampling: RejectionSampling) -> None:
        self._coupled, self._drafter, self._sampling = Coupled(sampler), drafter, sampling

    def draw(self, logits: Tensor, spans: Sequence[Span]) -> list[list[Draw]]:
        """See Verifier."""
        judged = [span.verify > 0 and not span.state.draws.greedy for span in spans]
        if not any(judged):
            return self._coupled.draw(logits, spans)
        rows: tuple[list[int], list[int]] = [], []
        first = 0
        for span, own in zip(spans, judged, strict=True):
            rows[own].extend(range(first, first + 1 + span.verify))
            first += 1 + span.verify
        drawn = iter(self._drawn(logits[rows[True]], [span for span, own in zip(spans, judged, strict=True) if own]))
        if not rows[False]:
            return list(drawn)
        others = iter(self._coupled.draw(logits[rows[False]], [span for span, own in zip(spans, judged, strict=True) if not own]))
        return [next(drawn if own else others) for own in judged]

    def _drawn(self, logits: Tensor, spans: Sequence[Span]) -> list[list[Draw]]:
        told = [span.state.params.logprobs for span in spans]
        raw = None if all(count is None for count in told) else logits.clone()
        tokens = self._sampling.verify(logits, spans, self._drafter)
        found: list[list[Draw]] = []
        first = 0
        for span, own, count in zip(spans, tokens, told, strict=True):
            if raw is None or count is None:
                found.append([Draw(token, None) for token in own])
            else:
                some = raw[first : first + len(own)]
                entries = describe(some, torch.tensor(own, device=raw.device), [count] * len(own))
                found.append([Draw(token, entry) for token, entry in zip(own, entries, strict=True)])
            first += 1 + span.verify
        return found
