"""How much of prompts goes into an iteration, and whether one is launched ahead, by what iterations cost."""

from collections.abc import Iterable

from cluster.config import BatchConfig
from cluster.cost import StepCost
from cluster.launched import Launched
from cluster.protocol import StepResult
from cluster.request import Sequence

_LEAST_CHUNK = 16
"""Tokens of a prompt in one plan, at least, where there are as many."""
_SHORT_S = 0.01
"""Iterations below it may be run ahead: the engine's turnaround, half a millisecond to one, is a twentieth of it."""


class Pace:
    """Of one engine in one epoch."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self.cost = StepCost()
        """To be told of every result."""

    def ran(self, launched: Launched, result: StepResult) -> None:
        """A plan's result has come."""
        self.cost.observe(launched.num_tokens, result.compute_s - result.draft_s)

    def prefill_tokens(self, left: int, decodes: int, known: Iterable[Sequence]) -> int:
        """Tokens of prompts, of the `left` that may be, for an iteration with so many decodes. `known`: who runs and who waits.

        Those that decode wait for them, so beside decodes there are no more than keep an iteration's fixed part small. With several
        stages prompts are cut so that they are through the last one soonest.
        """
        stages = self._config.pp
        if stages == 1 or self._config.shares == 1:
            return min(left, self.cost.beside_decodes) if decodes and self._config.batching == "continuous" else left
        backlog = 0
        for sequence in known:
            if sequence.schedulable > 1:
                backlog += sequence.schedulable
                if self.cost.chunk(backlog, stages) >= left:
                    return left
        return min(left, max(_LEAST_CHUNK, self.cost.chunk(backlog, stages)))

    def runs_ahead(self, newest: Launched, free_blocks: int, running: int) -> bool:
        """Whether a plan may be launched while the `newest` one is under way. Not where a new request would wait long for it, nor
        where blocks are so few that somebody has to give up some: of sequences in flight nobody does."""
        if not self._config.may_run_ahead or free_blocks < running:
            return False
        return self._config.run_ahead == "on" or self.cost.seconds(newest.num_tokens) < _SHORT_S

    def reserved(self, known: Iterable[Sequence]) -> int:
        """Tokens of an iteration that proposals leave to prompts: what those need, as much as they get beside decodes, and at most
        half of all."""
        most = min(self.cost.beside_decodes, self._config.max_num_batched_tokens // 2)
        backlog = 0
        for sequence in known:
            backlog += max(0, sequence.schedulable - 1)
            if backlog >= most:
                return most
        return backlog
