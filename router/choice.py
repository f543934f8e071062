"""One of a request's outputs: what its tokens say, until it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.protocol import SamplingParams, TokenLogprobs
from router.detokenizer import Detokenizer, StopFinder
from router.generation import ChoiceDelta
from router.vocabulary import Vocabulary


@dataclass(frozen=True)
class Reading:
    """How the tokens of an output are read as text, and where that ends."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    """What ends a choice, a stop string or a stop token, belongs to its text."""
    show_special: bool = False
    """Special tokens show by their names."""
    asked_stops: frozenset[int] = frozenset()
    """Stop tokens named by the user, as apart from the model's own end of sequence."""
    echo: bool = False
    """The prompt stands before the output."""


@dataclass
class Increment:
    """What a choice gained since it was last asked. `tokens` may run ahead of `text`, part of which is held back."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """With logprobs, per token: the character of the whole text at which it starts."""
    finish: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    """The stop string, or the user's stop token, that ended the choice. None for the end of sequence."""

    @classmethod
    def joined(cls, parts: Sequence["Increment"]) -> "Increment":
        """All that was gained over several increments, in order."""
        whole = cls("".join(part.text for part in parts))
        for part in parts:
            whole.tokens += part.tokens
            whole.logprobs += part.logprobs
            whole.offsets += part.offsets
            whole.finish, whole.stop_reason = part.finish, part.stop_reason
        return whole


class Choice:
    """Feeds on deltas, gives increments. Once it has finished, further deltas are dropped: nobody asked for what they say."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], params: SamplingParams, reading: Reading) -> None:
        self._detokenizer = Detokenizer(vocabulary, prompt, show_special=reading.show_special, echoed=reading.echo)
        self._finder = StopFinder(reading.stops, include=reading.include_stop)
        self._reading = reading
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._characters = 0
        self._text: list[str] = []
        self._gained = Increment()
        self.finish: Literal["stop", "length"] | None = None
        self.num_tokens = 0
        self.logprob = 0.0
        """Of all its tokens together, where each came with its own."""

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token; that of no tokens, and what isn't a number, is the least there is."""
        mean = self.logprob / self.num_tokens if self.num_tokens else -math.inf
        return -math.inf if math.isnan(mean) else mean

    def feed(self, delta: ChoiceDelta) -> None:
        """Take the tokens in, up to the one that completes a stop string."""
        last = len(delta.tokens) - 1
        for i, token in enumerate(delta.tokens):
            if self.finish is not None:
                return
            self.num_tokens += 1
            self._finder.armed = self.num_tokens > self._min_tokens
            self._gained.tokens.append(token)
            if delta.logprobs:
                self.logprob += delta.logprobs[i].logprob
                self._gained.logprobs.append(delta.logprobs[i])
                self._gained.offsets.append(self._characters)
            ends = i == last and delta.finish == "stop" and token in self._stop_tokens
            if ends:
                self._gained.stop_reason = token if token in self._reading.asked_stops else None
            if not ends or self._reading.include_stop:
                self._add(self._detokenizer.feed(token))
        if delta.finish is not None and self.finish is None:
            self._add(self._detokenizer.flush())
            if self.finish is None:
                self._text.append(self._finder.flush())
                self._finish("stop" if delta.finish == "stop" else "length")

    def take(self) -> Increment:
        """What was gained since the last call."""
        gained, self._gained = self._gained, Increment()
        gained.text = "".join(self._text)
        self._text.clear()
        return gained

    def _add(self, text: str) -> None:
        self._characters += len(text)
        if certain := self._finder.feed(text):
            self._text.append(certain)
        if self._finder.found is not None:
            self._gained.stop_reason = self._finder.found
            self._finish("stop")

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.finish = self._gained.finish = reason
