"""A request and its sequences as an engine keeps them. Few counters are stored, the rest is derived."""

from dataclasses import dataclass, field

from cluster.acceptance import Speculated
from cluster.protocol import FinishReason, NewSequence, PromptScores, Request, SamplingParams, TokenDelta
from kv.names import TOKEN_BYTES, pack


@dataclass(eq=False)
class Scoring:
    """How far a request's prompt log-probabilities are asked for. Its sequences share it: who computes a position tells it."""

    reached: int
    """Prompt positions before it are delivered, or will be by launched plans."""
    end: int
    """The prompt's length; 0 if no log-probabilities are wanted."""

    @property
    def complete(self) -> bool:
        """Nothing is left to ask for."""
        return self.reached >= self.end

    def take(self, computed: int) -> tuple[int, int] | None:
        """[first, end): what a chunk that computes up to position `computed` is to tell; None if nobody waits for any of it.

        Logits tell the position after their own. Every sequence begins at 0 while this is not complete, so none leaves a gap.
        """
        first, self.reached = self.reached, max(self.reached, min(computed + 1, self.end))
        return (first, self.reached) if first < self.reached else None


@dataclass(eq=False)
class Sequence:
    """(request, choice): the unit of scheduling, of block tables and of noise."""

    seq: int
    request: Request
    choice: int
    emitted: list[int]
    """Generated tokens, those of earlier attempts included."""
    received_at: float
    scoring: Scoring
    num_computed: int = 0
    """Positions whose KV is valid or will be once all launched plans have run."""
    in_flight: int = 0
    """Launched plans that hold a chunk of this sequence."""
    sent: bool = False
    """The workers know its prompt and parameters."""
    started_at: float | None = None
    """When the first plan with it was launched."""
    cached: int = 0
    """Tokens whose KV the prefix cache had when it first got a place."""
    expected: int = 0
    """Tokens whose KV it had when the sequence came."""
    proposed: list[int] = field(default_factory=list)
    """What may come next, as far as the workers proposed something."""
    speculated: Speculated = field(default_factory=Speculated)
    finish: FinishReason | None = None
    """Set once: no further token of it is wanted."""
    told: bool = False
    """Some of its prompt's log-probabilities were delivered."""
    parent: "Sequence | None" = None
    """The sibling whose prompt KV this one can fork, as long as that is in the pool."""
    _key: bytearray = field(default_factory=bytearray)

    @property
    def key(self) -> bytearray:
        """All known tokens, packed: what the prefix cache knows them by. Not to be changed."""
        packed = len(self._key) // TOKEN_BYTES
        if packed == 0:
            self._key += pack(self.request.prompt)
            packed = len(self.request.prompt)
        if packed < self.num_tokens:
            self._key += pack(self.emitted[packed - len(self.request.prompt) :])
        return self._key

    @property
    def params(self) -> SamplingParams:
        """The request's."""
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and emitted."""
        return len(self.request.prompt) + len(self.emitted)

    @property
    def max_num_tokens(self) -> int:
        """The most tokens it can come to, the model's limit aside."""
        return len(self.request.prompt) + self.params.max_tokens

    @property
    def schedulable(self) -> int:
        """Known tokens that no plan has covered yet: many for a prompt, 1 for a decode, 0 while its next token is being drawn, less
        while a plan that `chains` is launched too, or proposed tokens are verified."""
        return self.num_tokens - self.num_computed

    @property
    def chains(self) -> bool:
        """Its next token is being drawn, and will not be the last for all that is known: another one can be drawn after it before
        anybody but the worker knows it."""
        return self.schedulable == 0 and self.in_flight == 1 and len(self.emitted) + 1 < self.params.max_tokens

    @property
    def ahead(self) -> int:
        """Tokens of a prompt that are yet to be planned, as far as is known: not those that the cache or its `parent` has."""
        if self.schedulable <= 1:
            return 0
        known = self.expected if self.parent is None else len(self.request.prompt) - 1
        return max(1, self.schedulable - (0 if self.num_computed else known))

    @property
    def order(self) -> tuple[float, ...]:
        """First come first served."""
        return (self.received_at, self.seq)

    def introduction(self) -> NewSequence:
        """What workers must know of it."""
        return NewSequence(choice=self.choice, prompt=self.request.prompt, emitted=list(self.emitted), params=self.params)

    def news(self, scores: PromptScores | None) -> TokenDelta:
        """A delta with `scores` and, so far, no tokens."""
        first = not self.told and len(self.emitted) == len(self.request.emitted[self.choice])
        self.told = self.told or scores is not None
        return TokenDelta(
            request=self.request.id,
            attempt=self.request.attempt,
            choice=self.choice,
            index=len(self.emitted),
            tokens=[],
            queued_s=self.started_at - self.received_at if first and self.started_at is not None else None,
            prompt_index=scores.first if scores is not None else 0,
            prompt_logprobs=scores.logprobs if scores is not None else [],
            cached_tokens=min(self.cached, len(self.request.prompt)) if first else None,
        )


def why_impossible(request: Request, limit: int) -> str | None:
    """The reason why `request` could never run where sequences hold `limit` tokens, or None."""
    params, emitted = request.params, request.emitted
    if len(request.prompt) + params.max_tokens > limit:
        asked = f"prompt ({len(request.prompt)}) and max_tokens ({params.max_tokens})"
        return f"{asked} exceed the {limit} tokens that fit here"
    if not request.prompt or params.n < 1 or params.max_tokens < 0:
        return "there is nothing to compute: prompt and n must be at least 1, and max_tokens 0"
    if len(emitted) != params.n or len(request.finished) != params.n or all(request.finished):
        return f"emitted and finished must speak of {params.n} choices, of which one at least still runs"
    if any(len(e) >= max(1, params.max_tokens) and not f for e, f in zip(emitted, request.finished, strict=True)):
        return "a choice that still runs has all of its max_tokens"
    return None
