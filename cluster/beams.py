"""Beam search (Lowerre 1976), by the rules of transformers' generate: a request's likeliest outputs, as the model itself sees them.

A group is one request. It begins with one sequence, which computes the prompt. Each round draws once for every live beam: workers
tell the likeliest tokens and the group picks among those of all beams, when the last of them has come.

    live beams --one draw each--> candidates --+-- ends, and is among the first `width`: a hypothesis, of which the best are kept
        ^                                      |
        +---- the `width` best that go on -----+

A beam's first child goes on in the beam's own sequence; every further one is a new sequence that forks its KV; a beam without
children leaves. Nothing is told of an output before the end of all, so that after a death the request simply starts over.

No I/O in here: cluster/batcher.py gives sequences their places and blocks.
"""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from cluster.protocol import FinishReason, Request, SamplingParams, TokenDelta, TokenLogprobs
from cluster.request import Scoring, Sequence
from kv.names import TOKEN_BYTES

MAX_LENGTH_PENALTY = 10
"""Far beyond what changes anything, and what length ** length_penalty can be computed with."""


@dataclass(frozen=True, eq=False)
class Path:
    """An output as far as it has come: its last token, and the path that token continues."""

    before: "Path | None"
    token: int
    told: TokenLogprobs | None
    """Of the token, where the request asks for it."""
    logprob: float
    """Of all its tokens together."""
    length: int

    def steps(self) -> "list[Path]":
        """The paths it came by, itself included, from the first token on."""
        steps: list[Path] = []
        path: Path | None = self
        while path is not None and path.length:
            steps.append(path)
            path = path.before
        return steps[::-1]


_ROOT = Path(None, -1, None, 0.0, 0)


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """An output that has ended."""

    path: Path
    score: float
    """Log-probability over length ** length_penalty: what hypotheses are ranked by."""
    finish: FinishReason


class BeamSearch:
    """The search alone: log-probabilities in, live paths and hypotheses out. Of equals, the earlier beam and the lower token id
    come first, so that the outcome does not depend on who computed what when."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.live: list[Path] = [_ROOT]
        """Best first."""
        self.done: list[Hypothesis] = []
        """Best first, `beam_width` at most."""
        self.over = False
        self._stops = frozenset(params.stop_token_ids)

    def advance(self, told: Ordered[TokenLogprobs]) -> list[int]:
        """Take in a round's likeliest tokens, told[i] those after live[i]; returns for each new live path the beam it continues."""
        params, length = self.params, self.live[0].length + 1
        last = length == params.max_tokens
        ended: list[Hypothesis] = []
        going: list[tuple[int, Path]] = []
        for rank, (minus, beam, token, logprob) in enumerate(self._candidates(told)):
            stops = token in self._stops
            if rank >= params.beam_width and (last or len(going) == params.beam_width):
                break
            if not (stops or last):
                if len(going) < params.beam_width:
                    going.append((beam, self._continued(beam, token, logprob, -minus, told)))
            elif rank < params.beam_width:
                path = self._continued(beam, token, logprob, -minus, told)
                ended.append(Hypothesis(path, self._score(path), "stop" if stops else "length"))
        self.done = sorted([*self.done, *ended], key=lambda hypothesis: -hypothesis.score)[: params.beam_width]
        self.live = [path for _, path in going]
        self.over = not going or (len(self.done) == params.beam_width and (params.early_stopping or not self._can_improve()))
        return [beam for beam, _ in going]

    def _candidates(self, told: Ordered[TokenLogprobs]) -> list[tuple[float, int, int, float]]:
        """(minus the log-probability of the whole path, beam, token, log-probability of the token), best first."""
        stopping = self.live[0].length >= self.params.min_tokens
        return sorted(
            (-(path.logprob + logprob), beam, token, logprob)
            for beam, (path, entry) in enumerate(zip(self.live, told, strict=True))
            for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
            if logprob > -math.inf and (stopping or token not in self._stops)  # what isn't a number is no candidate
        )

    def _continued(self, beam: int, token: int, logprob: float, total: float, told: Ordered[TokenLogprobs]) -> Path:
        before, count = self.live[beam], self.params.logprobs
        top = told[beam]
        entry = None if count is None else TokenLogprobs(logprob, top.top_ids[:count], top.top_logprobs[:count])
        return Path(before, token, entry, total, before.length + 1)

    def _score(self, path: Path) -> float:
        return path.logprob / math.pow(path.length, self.params.length_penalty)

    def _can_improve(self) -> bool:
        """Whether the best live path, if it ended here, would be among the hypotheses. (Longer ones may gain by a length penalty
        above 0: like transformers' early_stopping=False, this does not wait for them.)"""
        return self._score(self.live[0]) > self.done[-1].score


@dataclass(eq=False)
class Beam(Sequence):
    """One of a group's live beams: a sequence whose next token is chosen together with those of the others."""

    group: "BeamGroup" = field(kw_only=True)
    drawn: TokenLogprobs | None = None
    """What comes after it; its next token is known when all of its siblings have theirs."""

    @property
    def order(self) -> tuple[float, ...]:
        """First come first served, a group's beams one after the other."""
        return (self.received_at, self.group.first.seq, self.seq)


class BeamGroup:
    """A request with a beam width, and the sequences of its live beams."""

    def __init__(self, request: Request, number: Callable[[], int], now: float) -> None:
        """number: gives sequences theirs."""
        self.request = request
        self.wanted = {choice for choice in range(request.params.n) if not request.finished[choice]}
        """Choices that somebody waits for."""
        self._search = BeamSearch(request.params)
        self._number = number
        scoring = Scoring(request.scored, 0 if request.params.prompt_logprobs is None else len(request.prompt))
        self.first = Beam(number(), request, 0, [], now, scoring, group=self)
        self.beams = [self.first]
        """Best first: of the search's live paths."""

    @property
    def width(self) -> int:
        """Places in the running set that it counts for, however many beams there are."""
        return self.request.params.beam_width

    @property
    def over(self) -> bool:
        """All hypotheses that will be are there."""
        return self._search.over

    def take(self, beam: Beam, told: TokenLogprobs) -> bool:
        """Take in what may come after one beam; True if it was the last that the round waited for."""
        beam.drawn = told
        return all(beam.drawn is not None for beam in self.beams)

    def turn(self) -> tuple[list[Beam], list[Beam]]:
        """Begin the next round. Returns the beams that have no place in it, and the new ones: each is to fork the KV of its
        `parent`, which goes on itself, without the last token that each of the two has now."""
        before, self.beams = self.beams, []
        forked: list[Beam] = []
        continued = self._search.advance([beam.drawn for beam in before if beam.drawn is not None])
        for number, path in zip(continued, self._search.live, strict=True):
            beam = before[number]
            if beam.drawn is not None:
                beam.drawn = None
                beam.emitted.append(path.token)
            else:
                beam = self._forked(beam, path.token)
                forked.append(beam)
            self.beams.append(beam)
        return [beam for beam in before if beam.drawn is not None], forked

    def _forked(self, parent: Beam, token: int) -> Beam:
        emitted = [*parent.emitted[:-1], token]
        known = parent.key[:-TOKEN_BYTES]
        fork = Beam(self._number(), self.request, 0, emitted, parent.received_at, parent.scoring, _key=known, group=self)
        fork.parent = parent
        return fork

    def waits_for(self, beam: Sequence, placed: Callable[[int], bool]) -> bool:
        """Whether its round waits for `beam` or for another one that has no place in the running set."""
        return any(other.drawn is None and (other is beam or not placed(other.seq)) for other in self.beams)

    def outcome(self) -> list[TokenDelta]:
        """All of the choices that somebody waits for, when it is `over`. Where there were too few candidates for so many
        hypotheses, as with a tiny vocabulary, the last choices are empty."""
        done = dict(enumerate(self._search.done))
        return [self._told(choice, done.get(choice)) for choice in sorted(self.wanted)]

    def _told(self, choice: int, hypothesis: Hypothesis | None) -> TokenDelta:
        first, request = self.first, self.request
        steps = [] if hypothesis is None else hypothesis.path.steps()
        return TokenDelta(
            request=request.id,
            attempt=request.attempt,
            choice=choice,
            index=0,
            tokens=[step.token for step in steps],
            logprobs=[step.told for step in steps if step.told is not None],
            finish="length" if hypothesis is None else hypothesis.finish,
            queued_s=None if first.started_at is None else first.started_at - first.received_at,
            cached_tokens=min(first.cached, len(request.prompt)),
        )


def why_no_beams(params: SamplingParams, most: int, forks: bool) -> str | None:
    """The reason why a search with `params` could never run where `most` sequences run at once and KV can be forked or not."""
    if not forks:
        return "beams need batching 'continuous' and reservation 'paged': they fork each other's KV"
    if params.beam_width > most:
        return f"the beam width ({params.beam_width}) exceeds the {most} sequences that run at once here"
    if params.n > params.beam_width:
        return f"n ({params.n}) exceeds the beam width ({params.beam_width})"
    if params.max_tokens < 1:
        return "a beam search needs max_tokens of at least 1"
    if not abs(params.length_penalty) <= MAX_LENGTH_PENALTY:
        return f"the length penalty ({params.length_penalty}) is not between -{MAX_LENGTH_PENALTY} and {MAX_LENGTH_PENALTY}"
    if any(_changed(params)):
        return "a beam search goes by the model's own log-probabilities: penalties, logit_bias, top_k, top_p and min_p can't be had"
    return None


def _changed(params: SamplingParams) -> Iterable[bool]:
    """Whatever would change or filter the model's distribution. Temperature is ignored: a search draws nothing."""
    yield bool(params.logit_bias) or params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    yield params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
