"""Engine <-> workers: iterations."""

from typing import Literal

from cluster.protocol.base import Wire
from cluster.protocol.requests import SamplingParams
from cluster.protocol.tokens import TokenLogprobs


class NewSequence(Wire, kw_only=True):
    """All a worker must know of a sequence, sent once."""

    choice: int
    prompt: list[int]
    emitted: list[int]
    params: SamplingParams


class Admission(Wire):
    """A sequence enters (or, after a preemption, re-enters) the running set with this block table.

    The first `num_computed` positions of the table hold valid KV; `new` or `parent` comes with the first admission only.
    """

    seq: int
    num_computed: int
    blocks: list[int]
    new: NewSequence | None = None
    parent: int | None = None
    """It is a fork: what is known of this sequence, up to `num_computed`, is known of it too."""


class Chunk(Wire):
    """Run positions [start, start + num_tokens) of a sequence: prefill, decode and verification alike."""

    seq: int
    start: int
    num_tokens: int
    new_blocks: list[int]
    """Appended to the block table before the chunk runs."""
    tokens: list[int]
    """Ids at the chunk's last len(tokens) positions, where a worker can't have them yet. Empty for prompts, which came with the
    sequence, and where the worker that samples is the one that embeds."""
    sample: bool
    """Draw a token from the logits of the last position."""
    scores: tuple[int, int] | None = None
    """[first, end): prompt positions whose log-probabilities are wanted; the logits one position before tell each of them."""
    verify: int = 0
    """The last so many of `tokens` were proposed: they stand as far as the tokens drawn before each of them are the same."""
    propose: int = 0
    """At most so many tokens to propose, after those that are drawn."""


class Transfer(Wire):
    """Whole blocks, all layers, from the pool to slots of host memory or back; each rank moves its own part of them."""

    kind: Literal["store", "load"]
    """store: to the host. load: from there; the slots may be stored into by the next transfer."""
    blocks: list[int]
    """No block (of a load) or slot (of a store) is written twice by one transfer."""
    slots: list[int]
    """One for each block."""
    copies: int
    """How many of the plan's copies come before it."""


class StepPlan(Wire, tag=True, kw_only=True):
    """Engine -> first stage -> next stage ...: one iteration, as differences.

    Order of execution: drop `finished`, apply `admitted`, run `copies` and `transfers` in order, each transfer after as many copies
    as it says, then run `chunks` as one batch in the order given. So each copy and transfer reads what earlier plans, or those
    before it, have left: a block is stored before it is written anew, and a slot loaded before it is.
    """

    epoch: int
    step: int
    admitted: list[Admission]
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    """(source block, destination block), whole blocks, all layers."""
    finished: list[int]
    transfers: list[Transfer] = []


class ChunkResult(Wire):
    """Of one chunk with `sample`: the tokens drawn: one, and one more for each token to verify that stood.

    Of a beam: the likeliest token, and in `logprobs` one entry with as many likeliest ones as beam_width and stop tokens come to,
    or as many as are asked for. Which of them comes next is the engine's to say, in `tokens` of the next chunk.
    """

    seq: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    proposed: list[int] = []
    """What may come next."""


class PromptScores(Wire):
    """Of one chunk with `scores`: the log-probabilities of its prompt positions, from `first` on."""

    seq: int
    first: int
    logprobs: list[TokenLogprobs]


class StepResult(Wire, tag=True, kw_only=True):
    """Last stage -> engine."""

    epoch: int
    step: int
    results: list[ChunkResult]
    compute_s: float = 0.0
    error: str | None = None
    """A worker's exception: the epoch is over."""
    scores: list[PromptScores] = []
    draft_s: float = 0.0
    """Of compute_s, what proposing took ..."""
    draft_passes: list[tuple[int, float]] = []
    """... and of that the passes of a draft model: tokens and seconds of each. The first one reads, the others go on from there."""
