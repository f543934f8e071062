"""What an answer says of its prompt: the text, where it is echoed, and log-probabilities, where they are asked for."""

from dataclasses import dataclass, field

from cluster.protocol import TokenLogprobs
from router.detokenizer import Detokenizer
from router.vocabulary import Vocabulary


@dataclass(eq=False)
class Prompt:
    """One prompt of a request."""

    tokens: list[int]
    text: str = ""
    """What stands before each of its outputs: nothing unless it is echoed."""
    offsets: list[int] = field(default_factory=list)
    """With echo, per token: the character of `text` at which it starts."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of positions 1, 2, ... as far as they have come; all have before any token of the output."""


def echoed(vocabulary: Vocabulary, tokens: list[int], *, show_special: bool) -> Prompt:
    """A prompt of token ids that is echoed as they read. A character that they leave unfinished is left to the output, which may
    complete it."""
    detokenizer = Detokenizer(vocabulary, show_special=show_special)
    pieces, offsets, reached = [], [], 0
    for token in tokens:
        offsets.append(reached)
        pieces.append(detokenizer.feed(token))
        reached += len(pieces[-1])
    return Prompt(tokens, "".join(pieces), offsets)
