"""What an answer says of its prompt: the text, where it is echoed, and log-probabilities, where they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.protocol import TokenLogprobs
from router.detokenizer import Detokenizer
from router.vocabulary import Vocabulary


@dataclass
class Prompt:
    """One prompt of a request."""

    tokens: list[int]
    text: str = ""
    """What stands before each of its outputs: nothing unless it is echoed."""
    offsets: list[int] = field(default_factory=list)
    """With echo, per token: the character of `text` at which it starts."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of positions 1, 2, ... as far as they have come; all have before any token of the output."""


def echoed(vocabulary: Vocabulary, tokens: list[int], text: str | None, *, show_special: bool) -> Prompt:
    """A prompt that is echoed: as it was written where that is known (`text`), else as its tokens read.

    A character that token ids leave unfinished is left to the output, which may complete it.
    """
    if text is None:
        return Prompt(tokens, *_read(vocabulary, tokens, show_special))
    detokenizer = Detokenizer(vocabulary)
    offsets, reached = [], 0
    for token in tokens:
        offsets.append(min(reached, len(text)))
        if token in vocabulary.special:  # spelled out in the text, or put there by the tokenizer
            name = vocabulary.token_bytes(token).decode()
            reached += len(name) if text.startswith(name, reached) else 0
        else:
            reached += len(detokenizer.feed(token))
    return Prompt(tokens, text, offsets)


def _read(vocabulary: Vocabulary, tokens: Sequence[int], show_special: bool) -> tuple[str, list[int]]:
    detokenizer = Detokenizer(vocabulary, show_special=show_special)
    pieces, offsets, reached = [], [], 0
    for token in tokens:
        offsets.append(reached)
        pieces.append(detokenizer.feed(token))
        reached += len(pieces[-1])
    return "".join(pieces), offsets
