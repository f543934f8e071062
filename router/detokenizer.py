"""From tokens to text while they come: characters split over tokens, stop strings split over tokens."""

import codecs
from collections.abc import Sequence

from router.vocabulary import Vocabulary

_CONTEXT = 128
"""Prompt tokens looked at for a character that the prompt left unfinished: few, unless tokens without text come after it."""


class Detokenizer:
    """Text of one output, as far as it is certain.

    An incomplete character is held back until it is complete; bytes that can't become a character are U+FFFD at once. Each token
    costs its own bytes only. The output continues the prompt: where an encoder marks the start of a text with a space, the
    output's first space is kept, unless the prompt had no text.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt: Sequence[int] = (), *, show_special: bool = False, echoed: bool = False
    ) -> None:
        """show_special: special tokens show by their names. echoed: the prompt is part of the text, so that an unfinished character
        at its end has to show as well."""
        self._bytes_of = vocabulary.token_bytes if show_special else vocabulary.text_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(self._end(prompt))
        self._strip = 0 if any(self._bytes_of(token) for token in prompt) else vocabulary.leading_spaces
        self._fed = echoed

    def feed(self, token: int) -> str:
        """The text that became certain with this token."""
        data = self._bytes_of(token)
        if not data:
            return ""
        if self._strip:
            data = self._stripped(data)
        self._fed = True
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The output has ended: what an incomplete character shows as."""
        return self._decoder.decode(b"", final=True) if self._fed else ""

    def _end(self, prompt: Sequence[int]) -> bytes:
        """The prompt's last bytes, as many as a character may have."""
        end = b""
        for token in reversed(prompt[-_CONTEXT:]):
            end = self._bytes_of(token) + end
            if len(end) >= 4:
                break
        return end

    def _stripped(self, data: bytes) -> bytes:
        rest = data.lstrip(b" ")
        spaces = min(len(data) - len(rest), self._strip)
        self._strip = 0 if rest else self._strip - spaces
        return data[spaces:]


class StopFinder:
    """Finds the first of several stop strings in a text that comes in pieces.

    First is which is complete first; of two complete with the same character, the longer. That doesn't depend on how the text is
    cut into pieces. One Knuth-Morris-Pratt automaton per string: its state is how much of the string the text now ends with, which
    is also how much text has to be held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """include: the stop string belongs to the text."""
        self._include = include
        self.armed = True
        """While not, a stop string that becomes complete is text like any other."""
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first = {stop[0] for stop in stops}
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string (or with it). Nothing after one was found."""
        if self.found is not None or not text:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text  # most pieces: no stop string is under way, and none begins here
        for i, character in enumerate(text):
            if (stop := self._step(character)) is not None:
                self.found = stop
                text = self._held + text[: i + 1]
                self._held = ""
                return text if self._include else text[: len(text) - len(stop)]
        text = self._held + text
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text has ended: what was held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = self._borders[i][matched]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                if self.armed:
                    return stop
                matched = self._borders[i][matched]
            self._matched[i] = matched
        return None


def _borders(stop: str) -> list[int]:
    """borders[k]: length of the longest proper prefix of stop[:k] that is also its suffix."""
    borders = [0] * (len(stop) + 1)
    matched = 0
    for k in range(1, len(stop)):
        while matched and stop[k] != stop[matched]:
            matched = borders[matched]
        if stop[k] == stop[matched]:
            matched += 1
        borders[k + 1] = matched
    return borders
