"""Engine -> router: what came of it."""

from typing import Literal

from cluster.protocol.base import Wire

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenLogprobs(Wire):
    """Log-probabilities under the model's own distribution: before penalties, bias, temperature and filters."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int | None = None
    """1 for the likeliest token, equal ones sharing a rank. Of prompt tokens only."""


class TokenDelta(Wire, kw_only=True):
    """News of one choice: tokens [index, index + len(tokens)) of its output."""

    request: str
    attempt: int
    choice: int
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] = []
    """As long as tokens where the request asked for them, else empty."""
    finish: FinishReason | None = None
    queued_s: float | None = None
    """With the first delta of a choice: seconds from receipt by the engine to its first launched plan."""
    prompt_index: int = 0
    prompt_logprobs: list[TokenLogprobs] = []
    """News of the request rather than of the choice: prompt positions [prompt_index, prompt_index + len(prompt_logprobs))."""
    cached_tokens: int | None = None
    """With the first delta of a choice: tokens of the prompt whose KV was there already when it first ran."""
    verified: tuple[int, int] | None = None
    """Where speculation is on and something was drawn: how many proposed tokens were verified for it, and how many stood."""


class Deltas(Wire, tag=True):
    """Engine -> router: all that one step gave for the requests of that router."""

    engine: str
    epoch: int
    deltas: list[TokenDelta]


class Released(Wire, tag=True):
    """Engine -> router: these (request, attempt) are no longer run here and did not end. Place them again."""

    engine: str
    epoch: int
    requests: list[tuple[str, int]]
    reason: str
    suspects: list[str] = []
    """Of these, the requests that were in a plan when it failed: one of them may be what made it fail."""


class Rejected(Wire, tag=True):
    """Engine -> router: this attempt can never run here (larger than the pool, say)."""

    request: str
    attempt: int
    reason: str
