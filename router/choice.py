"""One of a request's outputs: what its tokens say, until it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.protocol import TokenLogprobs
from router.detokenizer import Detokenizer, StopFinder
from router.generation import ChoiceDelta
from router.vocabulary import Vocabulary


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

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        stops: Sequence[str],
        silent: frozenset[int],
        asked_stops: frozenset[int],
    ) -> None:
        """`silent` tokens end the choice and leave no text; `asked_stops` are those of them that the user named."""
        self._detokenizer = Detokenizer(vocabulary, prompt)
        self._finder = StopFinder(stops)
        self._silent = silent
        self._asked_stops = asked_stops
        self._characters = 0
        self._text: list[str] = []
        self._gained = Increment()
        self.finish: Literal["stop", "length"] | None = None
        self.num_tokens = 0

    def feed(self, delta: ChoiceDelta) -> None:
        """Take the tokens in, up to the one that completes a stop string."""
        last = len(delta.tokens) - 1
        for i, token in enumerate(delta.tokens):
            if self.finish is not None:
                return
            self.num_tokens += 1
            self._gained.tokens.append(token)
            if delta.logprobs:
                self._gained.logprobs.append(delta.logprobs[i])
                self._gained.offsets.append(self._characters)
            if i == last and delta.finish == "stop" and token in self._silent:
                self._gained.stop_reason = token if token in self._asked_stops else None
            else:
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
