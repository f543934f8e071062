"""A request and its sequences as an engine keeps them. Few counters are stored, the rest is derived."""

from dataclasses import dataclass

from cluster.protocol import FinishReason, Request, SamplingParams


@dataclass(eq=False)
class Sequence:
    """(request, choice): the unit of scheduling, of block tables and of noise."""

    seq: int
    request: Request
    choice: int
    emitted: list[int]
    """Generated tokens, those of earlier attempts included."""
    received_at: float
    num_computed: int = 0
    """Positions whose KV is valid or will be once all launched plans have run."""
    in_flight: int = 0
    """Launched plans that hold a chunk of this sequence."""
    sent: bool = False
    """The workers know its prompt and parameters."""
    started_at: float | None = None
    """When the first plan with it was launched."""
    finish: FinishReason | None = None
    """Set once: no further token of it is wanted."""
    parent: "Sequence | None" = None
    """The sibling whose prompt KV this one can fork, as long as that is in the pool."""

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
        """Known tokens that no plan has covered yet: many for a prompt, 1 for a decode, 0 while its next token is being drawn."""
        return self.num_tokens - self.num_computed

    @property
    def order(self) -> tuple[float, int]:
        """First come first served."""
        return (self.received_at, self.seq)
