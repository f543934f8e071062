"""The seam between the HTTP edge and the cluster: the edge programs against Generator, the dispatcher implements it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from cluster.protocol import ClusterStatus, FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Generation:
    """One prompt, tokenized and validated, with n choices to generate. A client's request is one or more of these."""

    id: str
    """Unique over the cluster."""
    prompt: list[int]
    params: SamplingParams
    """seed resolved; end-of-sequence ids are among stop_token_ids unless they are to be ignored."""
    timeout_s: float
    """Seconds from now after which the generator raises TimedOut."""
    cache_salt: str = ""
    """Cached prefixes are shared only among generations of the same salt."""


@dataclass(frozen=True)
class ChoiceDelta:
    """News of one choice. Every token comes exactly once and in order, whatever died meanwhile."""

    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As long as tokens where params.logprobs is set, else empty."""
    finish: FinishReason | None = None
    queued_s: float | None = None
    """With the generation's first news: seconds it waited, in the cluster's queue and the engine's, for its first iteration."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """With params.prompt_logprobs: of the next prompt positions, from 1 on. All come before the first token of any choice."""
    cached_tokens: int | None = None
    """With the generation's first news: how many tokens of its prompt were found in a cache."""
    verified: tuple[int, int] | None = None
    """Where speculation is on and something was drawn: how many proposed tokens were verified for it, and how many stood."""


@dataclass
class Speculation:
    """What speculation did for a request: all attempts, prompts and choices together."""

    proposed_tokens: int = 0
    """Those that were verified ..."""
    accepted_tokens: int = 0
    """... and of these, the ones that stood, with those after an end that was found among them."""
    steps: int = 0
    """Iterations that verified some, counted for each choice."""

    def add(self, proposed: int, stood: int) -> None:
        """Take in ChoiceDelta.verified."""
        self.proposed_tokens += proposed
        self.accepted_tokens += stood
        self.steps += proposed > 0


class Overloaded(Exception):
    """The cluster-wide queue is full."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("The queue is full. Please try again later.")
        self.retry_after_s = retry_after_s


class TooLarge(Exception):
    """Prompt and max_tokens together are more than any engine's pool holds."""


class Unavailable(Exception):
    """No engine could serve the generation, retries included."""


class TimedOut(Exception):
    """Generation.timeout_s passed."""


class Generator(Protocol):
    """Turns prompts into tokens."""

    def stream(self, generation: Generation) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Each item is all that is ready when the reader asks, so that a slow reader gets few large items.

        An empty list is news too: an engine took the generation, so the answer to the client may begin; a refusal (Overloaded,
        TooLarge) normally comes instead of it. The stream ends when every choice has finished or was named to finish_choice.
        Closing it, or cancelling its reader, cancels what is left of the generation.

        Raises Overloaded, TooLarge, Unavailable and TimedOut.
        """
        ...

    async def finish_choice(self, id: str, choice: int) -> None:
        """A stop string was found: this choice needs no more tokens. The stream goes on for the others."""
        ...

    def status(self) -> ClusterStatus | None:
        """The cluster as last heard of, None before the scheduler first spoke."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether it takes no more generations, because its process is to end."""
        ...
