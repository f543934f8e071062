"""How much goes into an iteration, whether one is launched ahead, and how much is proposed, by what iterations cost."""

from collections.abc import Iterable

from cluster.acceptance import Acceptance
from cluster.config import BatchConfig
from cluster.cost import StepCost
from cluster.launched import Launched
from cluster.protocol import StepResult
from cluster.request import Sequence

_LEAST_CHUNK = 16
"""Tokens of a prompt in one plan, at least, where there are as many."""
_SHORT_S = 0.01
"""Iterations below it may be run ahead: the engine's turnaround, half a millisecond to one, is a twentieth of it."""
_DRAFT_FADE = 0.1


class Pace:
    """Of one engine in one epoch."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self.cost = StepCost()
        """To be told of every result."""
        self._draft_s = 0.0
        """What the workers take to propose one token more for all sequences that are to have one."""
        self._usual = Acceptance(fade=0.99)
        """Of all sequences."""

    def ran(self, launched: Launched, result: StepResult) -> None:
        """A plan's result has come."""
        self.cost.observe(launched.num_tokens, result.compute_s - result.draft_s)
        if result.draft_token_s:
            self._draft_s += _DRAFT_FADE * (result.draft_token_s - self._draft_s)

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

    def wanted(self, sequence: Sequence, decodes: int) -> int:
        """How many tokens to propose for it, among so many that decode. Where none pays one is tried now and then."""
        acceptance, most = sequence.acceptance, self._most(sequence)
        if self._config.speculative_pace == "fixed":
            return most
        count = self._paying(sequence, decodes, most, self._draft_s)
        acceptance.trying = count == 0 and most > 0 and len(sequence.emitted) >= acceptance.try_at
        return count or int(acceptance.trying)

    def kept(self, sequence: Sequence, decodes: int) -> list[int]:
        """Of what was proposed for it, and paid for, as much as is worth verifying."""
        most = min(len(sequence.proposed), sequence.params.max_tokens - len(sequence.emitted) - 1)
        if self._config.speculative_pace == "adaptive":
            most = min(most, max(self._paying(sequence, decodes, most, 0.0), int(sequence.acceptance.trying)))
        return sequence.proposed[:most]

    def _most(self, sequence: Sequence) -> int:
        """Those that are certain to be within max_tokens, when one more token has been drawn."""
        left = sequence.params.max_tokens - len(sequence.emitted) - 2
        return 0 if sequence.params.beam_width else max(0, min(self._config.speculative_tokens, left))

    def _paying(self, sequence: Sequence, decodes: int, most: int, draft_s: float) -> int:
        """How many proposed tokens pay, at most `most`, each of which takes `draft_s` for all sequences together.

        An iteration takes `seconds` for at least `decodes` tokens. One token more to verify takes 1 / (fixed_tokens + decodes) of
        that, and its share of what it takes to propose it. So it pays if it stands with a probability above the product of these
        seconds and decodes / seconds; the n-th stands if all before it do.
        """
        pays = decodes / (self.cost.fixed_tokens + decodes) + draft_s / self.cost.seconds(decodes)
        chance, count, rate = 1.0, 0, sequence.acceptance.rate(self._usual)
        while count < most and (chance := chance * rate) > pays:
            count += 1
        return count

    def verified(self, sequence: Sequence, proposed: int, stood: int) -> None:
        """So many of the proposed tokens stood."""
        sequence.acceptance.observe(proposed, stood, len(sequence.emitted))
        self._usual.observe(proposed, stood, 0)
