"""What goes into the next iteration: decodes, chunks of prompts, and who comes in from the waiting line.

Token counts are scheduled, not phases: in each iteration `num_computed` of a sequence moves towards its `num_tokens`, by many
tokens while its prompt is new, by one when it decodes, by some more when proposed tokens are verified.
"""

import itertools
from collections import deque
from collections.abc import Sequence as Tokens

from cluster.beams import Beam
from cluster.config import BatchConfig
from cluster.launched import Launched
from cluster.line import WaitingLine
from cluster.pace import Pace
from cluster.protocol import Chunk, StepPlan
from cluster.request import Sequence
from cluster.running import RunningSet
from cluster.speculation import Speculation
from kv.manager import KVManager


class Planner:
    """Makes the plans of one engine in one epoch, and knows those in flight."""

    def __init__(self, config: BatchConfig, kv: KVManager, line: WaitingLine, running: RunningSet, epoch: int) -> None:
        self.config = config
        self.kv = kv
        self.line = line
        self.in_flight: deque[Launched] = deque()
        self.forks: list[Beam] = []
        """New beams, each to fork the KV of its parent before that runs on."""
        self.pace = Pace(config)
        self.speculation = Speculation(config, self.pace.cost)
        self._set = running
        self._epoch = epoch
        self._next_step = 0

    @property
    def _running(self) -> list[Sequence]:
        return self._set.sequences

    @property
    def last_step(self) -> int:
        """See Batcher."""
        return self._next_step - 1 + self.kv.has_transfers

    def wants_plan(self, *, beams: bool) -> bool:
        """Whether one more plan may be in flight. beams: there are some, which wait for each other."""
        if len(self.in_flight) != self.config.shares:
            return len(self.in_flight) < self.config.shares
        return not beams and self.pace.runs_ahead(self.in_flight[-1], self.kv.num_free, len(self._running))

    def schedule(self, now: float) -> StepPlan | None:
        """The next iteration, launched: None if nothing can run now. Call while it `wants_plan`."""
        self.line.release(self._set.can_fork)
        plan = StepPlan(epoch=self._epoch, step=self._next_step, admitted=[], chunks=[], copies=[], finished=[])
        self.kv.begin_plan(plan.copies)
        chosen: list[Sequence] = []
        forks, self.forks = self.forks, []
        for beam in forks:
            if not self._set.fork(beam, plan):
                self._set.stand_in_line(beam)
        decodes = self._schedule_decodes(plan, chosen)
        known = itertools.chain(self._running, self.line.waiting)
        budget = self.pace.prefill_tokens(self.config.max_num_batched_tokens - decodes, decodes, known)
        budget = self._schedule_prefills(plan, chosen, budget)
        self._admit(plan, chosen, budget)
        awaited = self.kv.has_transfers and self._set.besides
        if not plan.chunks and not plan.admitted and not awaited:
            return None
        plan.finished.extend(self._set.gone)
        self._set.gone.clear()
        self._take_transfers(plan)
        self._next_step += 1
        for sequence in chosen:
            sequence.started_at = now if sequence.started_at is None else sequence.started_at
        self.in_flight.append(Launched(plan, tuple(chosen)))
        return plan

    def _take_transfers(self, plan: StepPlan) -> None:
        """Those too that were decided when there was no plan to make of it."""
        plan.transfers = self.kv.take_transfers()
        for transfer in plan.transfers:
            if transfer.kind == "store":
                self._set.counters.stored += len(transfer.blocks)
            else:
                self._set.counters.loaded += len(transfer.blocks)

    def _schedule_decodes(self, plan: StepPlan, chosen: list[Sequence]) -> int:
        """At most ceil(running / shares), so that every stage has its share. Returns how many tokens they take."""
        most = -(-len(self._running) // self.config.shares)
        ahead = self.config.may_run_ahead and len(self.in_flight) == self.config.shares
        budget = self.config.max_num_batched_tokens
        if self.config.speculative_tokens:
            self.speculation.begin(self._running, most)
            if any(sequence.proposed for sequence in self._running):  # proposals leave prompts their share
                budget -= self.pace.reserved(itertools.chain(self._running, self.line.waiting))
        count = tokens = 0
        for sequence in list(self._running):
            if count == most:
                break
            # One that an older one preempted in this loop holds nothing any more.
            if (
                (sequence.schedulable == 1 or (ahead and sequence.chains))
                and sequence.finish is None
                and self.kv.holds(sequence.seq)
            ):
                room = budget - tokens - (most - count)
                proposals = self.speculation.kept(sequence)[: max(0, room)] if sequence.proposed else ()
                if self._run(sequence, 1, plan, chosen, proposals):
                    count, tokens = count + 1, tokens + plan.chunks[-1].num_tokens
        if self.config.batching == "static" and any(s.finish is None for s in self._running):
            for sequence in self._running:
                if count < most and sequence.finish is not None and self._rerun(sequence, plan, chosen):
                    count, tokens = count + 1, tokens + 1
        return tokens

    def _schedule_prefills(self, plan: StepPlan, chosen: list[Sequence], budget: int) -> int:
        """The next chunks of admitted prompts. Returns the budget left."""
        for sequence in list(self._running):
            if budget <= 0:
                break
            if sequence.schedulable > 1 and sequence.finish is None and self.kv.holds(sequence.seq):
                count = min(sequence.schedulable, budget)
                if self._run(sequence, count, plan, chosen):
                    budget -= count
        return budget

    def _admit(self, plan: StepPlan, chosen: list[Sequence], budget: int) -> None:
        """Take sequences from the head of the waiting line; none overtakes one that arrived before it."""
        static = self.config.batching != "continuous"
        if not self.line.waiting or (static and self._running):
            return
        places, free = self._set.free()
        while self.line.waiting and (budget > 0 or static):
            sequence = self.line.waiting[0]
            claim = self._set.claim(sequence)
            # What a group needs for its forks has to be free when it begins, unless nobody else runs.
            forks = self._set.margin * (claim - 1) if self._running else 0
            taken = self._set.enter(sequence, plan, free - forks) if claim <= places else None
            if taken is None:
                stalled = self._set.stalled(sequence)
                if stalled is None:
                    break
                self._set.preempt(stalled)
                places, free = self._set.free()
                continue
            places, free = places - claim, free - taken - self._set.margin * claim
            self.line.waiting.pop(0)
            count = min(sequence.schedulable, budget)
            if count > 0 and self._run(sequence, count, plan, chosen):
                budget -= count

    def _run(self, sequence: Sequence, count: int, plan: StepPlan, chosen: list[Sequence], proposals: Tokens[int] = ()) -> bool:
        """Add a chunk of `count` tokens, and of `proposals` if there are blocks for them at once; False if it can't run now."""
        end = sequence.num_computed + count
        draws = end >= sequence.num_tokens and sequence.params.max_tokens > 0
        propose = self.speculation.wanted(sequence) if draws and self.config.speculative_tokens else 0
        filled = end + len(proposals)
        longest = max(filled, min(filled + propose, sequence.max_num_tokens))  # a draft model goes on from there
        blocks = self.kv.allocate(sequence.seq, longest)
        if blocks is None and (proposals or propose):
            proposals, propose = (), 0
            blocks = self.kv.allocate(sequence.seq, end)
        if self.config.speculative_tokens:
            self.speculation.settled(sequence, verify=len(proposals), propose=propose)
        while blocks is None and self._set.make_room(sequence):
            blocks = self.kv.allocate(sequence.seq, end)
        if blocks is None:
            return False
        # What workers can't have yet is the token drawn last: the prompt came with the sequence, older tokens with older chunks,
        # and one that is still being drawn (see Sequence.chains) they have before anybody else.
        tokens = [*(sequence.emitted[-1:] if end == sequence.num_tokens else ()), *proposals]
        scores = sequence.scoring.take(end)
        chunk = Chunk(sequence.seq, sequence.num_computed, count + len(proposals), blocks, tokens, sample=draws, scores=scores)
        chunk.verify, chunk.propose = len(proposals), propose
        plan.chunks.append(chunk)
        if sequence.num_computed < len(sequence.request.prompt) or count > 1:  # what is computed again may be others' beginning too
            self.kv.record(sequence.seq, sequence.key, end)
        sequence.num_computed = end + len(proposals)
        sequence.proposed = []
        self._launch(sequence, chosen)
        return True

    def _rerun(self, sequence: Sequence, plan: StepPlan, chosen: list[Sequence]) -> bool:
        """A finished row of a static batch: computed on until the last one is done, as the original does. Its token is dropped."""
        if sequence.in_flight or not sequence.num_computed:
            return False
        plan.chunks.append(Chunk(sequence.seq, sequence.num_computed - 1, 1, [], [], sample=True))
        self._launch(sequence, chosen)
        return True

    def _launch(self, sequence: Sequence, chosen: list[Sequence]) -> None:
        sequence.in_flight += 1
        chosen.append(sequence)
