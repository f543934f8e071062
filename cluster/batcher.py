"""Iteration-level scheduling (ORCA, Yu et al. 2022, algorithm 1), with paging and preemption in place of reservation.

schedule() makes the plan of the next iteration, update() takes in the result of an earlier one; several plans may be in flight.
Token counts are scheduled, not phases: in each iteration `num_computed` of a sequence moves towards its `num_tokens`, by many
tokens while its prompt is new, by one when it decodes. Every choice is made here and once; workers execute plans in order.

    waiting --admit--> running --finish--> gone
       ^                  |
       +---- preempt -----+      (its blocks are freed; computed again later)

A sequence in a launched plan keeps its blocks until that plan has returned, whatever happens to it meanwhile.
"""

import bisect
import itertools
from collections import deque
from dataclasses import dataclass, fields

from cluster.config import BatchConfig
from cluster.cost import StepCost
from cluster.launched import Launched
from cluster.line import WaitingLine
from cluster.protocol import (
    Admission,
    Chunk,
    ChunkResult,
    Credit,
    EngineStats,
    FinishReason,
    Request,
    StepPlan,
    StepResult,
    TokenDelta,
)
from cluster.request import Scoring, Sequence, why_impossible
from kv.manager import KVManager
from kv.radix import NO_MATCH, PrefixMatch

_LEAST_CHUNK = 16
"""Tokens of a prompt in one plan, at least, where there are as many."""


@dataclass
class Counters:
    """Running totals of a Batcher."""

    preemptions: int = 0
    looked_up: int = 0
    """Tokens of sequences that got a place for the first time, and were looked up in the prefix cache ..."""
    cached: int = 0
    """... and of these, tokens whose KV was there."""
    stored: int = 0
    """Blocks sent to host memory ..."""
    loaded: int = 0
    """... and brought back."""

    def __add__(self, other: "Counters") -> "Counters":
        """Of both."""
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Batcher:
    """The running set, the waiting line and the plans in flight of one engine in one epoch."""

    def __init__(self, config: BatchConfig, kv: KVManager, epoch: int = 0) -> None:
        self.config = config
        self.kv = kv
        self.epoch = epoch
        self.line = WaitingLine()
        self.running: list[Sequence] = []
        """In order of arrival; all have a block table."""
        self.in_flight: deque[Launched] = deque()
        self._requests: dict[str, dict[int, Sequence]] = {}
        self.counters = Counters()
        self._next_seq = 0
        self._next_step = 0
        self._cost = StepCost()
        self._gone: list[int] = []
        """Sequences the workers may forget with the next plan."""

    # --- requests ---------------------------------------------------------------------------------------------------

    def why_impossible(self, request: Request) -> str | None:
        """The reason why `request` could never run here, or None."""
        return why_impossible(request, self.config.max_sequence_tokens)

    def add(self, request: Request, now: float) -> None:
        """Queue all choices of a request that `why_impossible` has nothing against."""
        choices = [c for c in range(request.params.n) if not request.finished[c]]
        sequences: dict[int, Sequence] = {}
        forks = self.config.reservation == "paged" and self.config.batching == "continuous"
        scoring = Scoring(request.scored, 0 if request.params.prompt_logprobs is None else len(request.prompt))
        for choice in choices:
            sequence = Sequence(self._next_seq, request, choice, list(request.emitted[choice]), now, scoring)
            self._next_seq += 1
            sequence.expected = self.kv.known_tokens(self._match(sequence))
            if forks and sequences:
                self.line.hold(sequence, sequences[choices[0]])
            else:
                self.line.join(sequence)
            sequences[choice] = sequence
        self._requests[request.id] = sequences

    def cancel(self, request: str, choices: list[int] | None = None) -> None:
        """Nobody waits for these choices (default: all) any more. Their blocks are freed when their plans have returned."""
        live = self._requests.get(request, {})
        for choice in list(live) if choices is None else choices:
            if choice in live:
                self._end(live[choice], "cancelled")

    def has_request(self, request: str) -> bool:
        """Whether at least one of its choices still runs or waits."""
        return request in self._requests

    @property
    def num_sequences(self) -> int:
        """Sequences that still run or wait."""
        return sum(len(live) for live in self._requests.values())

    # --- scheduling -------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next iteration, launched: None if nothing can run now. Call while fewer than config.depth plans are in flight."""
        self._end_static_batch()
        self.line.release(self._can_fork)
        plan = StepPlan(epoch=self.epoch, step=self._next_step, admitted=[], chunks=[], copies=[], finished=[])
        self.kv.begin_plan(plan.copies)
        chosen: list[Sequence] = []
        decodes = self._schedule_decodes(plan, chosen)
        budget = self._prefill_budget(self.config.max_num_batched_tokens - decodes)
        budget = self._schedule_prefills(plan, chosen, budget)
        self._admit(plan, chosen, budget)
        if not plan.chunks and not plan.admitted:
            return None
        plan.finished.extend(self._gone)
        self._gone.clear()
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
                self.counters.stored += len(transfer.blocks)
            else:
                self.counters.loaded += len(transfer.blocks)

    def _schedule_decodes(self, plan: StepPlan, chosen: list[Sequence]) -> int:
        """At most ceil(running / plans in flight), so that every stage has its share. Returns how many tokens they take."""
        most = -(-len(self.running) // self.config.depth)
        count = 0
        for sequence in list(self.running):
            if count == most:
                break
            # One that an older one preempted in this loop holds nothing any more.
            if sequence.schedulable == 1 and sequence.finish is None and self.kv.holds(sequence.seq):
                count += self._run(sequence, 1, plan, chosen)
        if self.config.batching == "static" and any(s.finish is None for s in self.running):
            for sequence in self.running:
                if count < most and sequence.finish is not None:
                    count += self._rerun(sequence, plan, chosen)
        return count

    def _schedule_prefills(self, plan: StepPlan, chosen: list[Sequence], budget: int) -> int:
        """The next chunks of admitted prompts. Returns the budget left."""
        for sequence in list(self.running):
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
        if not self.line.waiting or (static and self.running):
            return
        free = self.kv.num_free - self._blocks_promised()
        while self.line.waiting and len(self.running) < self.config.max_num_seqs and (budget > 0 or static):
            sequence = self.line.waiting[0]
            taken = self._enter(sequence, plan, free)
            if taken is None:
                break
            free -= taken
            self.line.waiting.pop(0)
            bisect.insort(self.running, sequence, key=_order)
            count = min(sequence.schedulable, budget)
            if count > 0 and self._run(sequence, count, plan, chosen):
                budget -= count

    def _enter(self, sequence: Sequence, plan: StepPlan, free: int) -> int | None:
        """Give `sequence` a block table if the `free` blocks hold all of its known tokens; returns how many it will take soon."""
        parent = sequence.parent
        if parent is not None and self._can_fork(parent):
            shared = len(sequence.request.prompt) - 1
            taken = self.kv.blocks_for(sequence.num_tokens) - shared // self.config.block_size
            beginning = self.kv.fork(parent.seq, sequence.seq, shared) if taken <= free else None
            sequence.cached = parent.cached
        else:
            match = self._match(sequence)
            taken = self.kv.blocks_to_admit(sequence.num_tokens, sequence.max_num_tokens) - len(match.blocks) + match.idle
            salt, longest = sequence.request.cache_salt, sequence.max_num_tokens
            beginning = self.kv.admit(sequence.seq, match, salt, longest) if taken <= free else None
            if beginning is not None and not sequence.sent:
                sequence.cached = beginning.num_tokens
                if self.kv.tree is not None and sequence.scoring.complete:
                    self.counters.looked_up += sequence.num_tokens
                    self.counters.cached += beginning.num_tokens
        if beginning is None:
            return None
        if beginning.copy is not None:
            plan.copies.append(beginning.copy)
        sequence.num_computed = beginning.num_tokens
        sequence.parent = None
        new = None if sequence.sent else sequence.introduction()
        plan.admitted.append(Admission(sequence.seq, sequence.num_computed, list(self.kv.table(sequence.seq)), new))
        sequence.sent = True
        return taken + self._margin

    def _match(self, sequence: Sequence) -> PrefixMatch:
        return self.kv.match(sequence.key, sequence.request.cache_salt) if sequence.scoring.complete else NO_MATCH

    def _can_fork(self, parent: Sequence) -> bool:
        return self.kv.holds(parent.seq) and parent.num_computed >= len(parent.request.prompt) - 1

    @property
    def _margin(self) -> int:
        """Blocks to keep free for each running sequence: with paging, the next one to decode into."""
        return 1 if self.config.reservation == "paged" else 0

    def _blocks_promised(self) -> int:
        """What the running sequences will take soon: the rest of their prompts, and the margin."""
        if self.config.reservation != "paged":
            return 0
        known = sum(max(0, self.kv.blocks_for(s.num_tokens) - len(self.kv.table(s.seq))) for s in self.running)
        return known + self._margin * len(self.running)

    def _run(self, sequence: Sequence, count: int, plan: StepPlan, chosen: list[Sequence]) -> bool:
        """Add a chunk of `count` tokens; False if there are no blocks for it now."""
        end = sequence.num_computed + count
        blocks = self.kv.allocate(sequence.seq, end)
        while blocks is None and self._make_room(sequence):
            blocks = self.kv.allocate(sequence.seq, end)
        if blocks is None:
            return False
        last = end == sequence.num_tokens
        # What workers can't have yet is the token drawn last: the prompt came with the sequence, older tokens with older chunks.
        tokens = sequence.emitted[-1:] if last else []
        draws = last and sequence.params.max_tokens > 0
        scores = sequence.scoring.take(end)
        plan.chunks.append(Chunk(sequence.seq, sequence.num_computed, count, blocks, tokens, sample=draws, scores=scores))
        if sequence.num_computed < len(sequence.request.prompt):
            self.kv.record(sequence.seq, sequence.key, end)
        sequence.num_computed = end
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

    def _make_room(self, sequence: Sequence) -> bool:
        """Free the blocks of one sequence that is in no launched plan, nor in the one being made: a finished one that a static
        batch holds, else the youngest that arrived after `sequence`. False if there is none."""
        idle = [s for s in self.running if s.in_flight == 0 and s is not sequence]
        done = next((s for s in idle if s.finish is not None), None)
        if done is not None:
            self._release(done)
            return True
        if not idle or idle[-1].order < sequence.order:
            return False
        self._preempt(idle[-1])
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._give_back(victim)
        victim.num_computed = 0
        self.counters.preemptions += 1
        self.line.join(victim)
        self.line.recall(victim)

    def _prefill_budget(self, left: int) -> int:
        """With several stages prompts are cut so that they are through the last one soonest (see StepCost)."""
        if self.config.pp == 1 or self.config.depth == 1:
            return left
        backlog = 0
        for sequence in itertools.chain(self.running, self.line.waiting):
            if sequence.schedulable > 1:
                backlog += sequence.schedulable
                if self._cost.chunk(backlog, self.config.pp) >= left:
                    return left
        return min(left, max(_LEAST_CHUNK, self._cost.chunk(backlog, self.config.pp)))

    # --- results ----------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenDelta]:
        """Take in the result of the oldest plan in flight (see `expects`); returns what is new for the clients."""
        launched = self.in_flight.popleft()
        self._cost.observe(sum(chunk.num_tokens for chunk in launched.plan.chunks), result.compute_s)
        drawn = {r.seq: r for r in result.results}
        told = {s.seq: s for s in result.scores}
        deltas: list[TokenDelta] = []
        for chunk, sequence in zip(launched.plan.chunks, launched.sequences, strict=True):
            sequence.in_flight -= 1
            delta = sequence.news(told.get(chunk.seq))
            if sequence.finish is not None:
                if sequence.in_flight == 0:
                    self._leave(sequence)  # cancelled, or finished earlier, while plans held it
            elif chunk.sample:
                self._advance(sequence, drawn[chunk.seq], delta)
            elif sequence.params.max_tokens == 0 and sequence.schedulable == 0 and sequence.in_flight == 0:
                delta.finish = "length"  # there was only the prompt to be told of
                self._end(sequence, "length")
            if delta.tokens or delta.finish is not None or (delta.prompt_logprobs and self.has_request(delta.request)):
                deltas.append(delta)
            if sequence.params.max_tokens == 0 and delta.finish is not None:
                deltas.extend(self._end_siblings(delta.request))
        return deltas

    def _end_siblings(self, request: str) -> list[TokenDelta]:
        """Where nothing is drawn, and one choice has told of the prompt, the others have nothing to tell and nothing to compute."""
        deltas = []
        for sibling in list(self._requests.get(request, {}).values()):
            delta = sibling.news(None)
            delta.finish = "length"
            self._end(sibling, "length")
            deltas.append(delta)
        return deltas

    def expects(self, result: StepResult) -> bool:
        """Whether this is the result of the oldest plan in flight."""
        return bool(self.in_flight) and self.in_flight[0].answered_by(result)

    def _advance(self, sequence: Sequence, result: ChunkResult, delta: TokenDelta) -> None:
        """Take in the tokens drawn, up to one that ends the choice."""
        for token in result.tokens:
            delta.tokens.append(token)
            sequence.emitted.append(token)
            delta.finish = self._finish_reason(sequence, token)
            if delta.finish is not None:
                break
        delta.logprobs = result.logprobs[: len(delta.tokens)]
        if delta.finish is not None:
            self._end(sequence, delta.finish)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token in sequence.params.stop_token_ids:
            return "stop"
        return "length" if len(sequence.emitted) >= sequence.params.max_tokens else None

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """No further token of `sequence` is wanted; it leaves as soon as no launched plan holds it."""
        sequence.finish = reason
        live = self._requests[sequence.request.id]
        del live[sequence.choice]
        if not live:
            del self._requests[sequence.request.id]
        self.line.orphan(sequence)
        if self.line.leave(sequence):
            self._forget(sequence)
        elif sequence.in_flight == 0:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running set; a static batch keeps its memory until the longest is done."""
        if self.config.batching == "continuous":
            self._release(sequence)

    def _end_static_batch(self) -> None:
        if self.config.batching != "continuous" and all(s.finish is not None and s.in_flight == 0 for s in self.running):
            for sequence in list(self.running):
                self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        self._forget(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Out of the running set; the prefix cache keeps the KV of its whole blocks, as long as there is room."""
        self.running.remove(sequence)
        self.kv.release(sequence.seq, sequence.key, sequence.num_computed)

    def _forget(self, sequence: Sequence) -> None:
        if sequence.sent:
            self._gone.append(sequence.seq)

    # --- readings ---------------------------------------------------------------------------------------------------

    def credit(self) -> Credit:
        """What could be taken besides all that was: free slots nobody has a claim on, and sequences.

        A few sequences more than run are asked for, so that a next one is here when a place falls free.
        """
        queued = sum(self.kv.blocks_to_admit(s.num_tokens, s.max_num_tokens) for s in self.line.everyone())
        claimed = self._blocks_promised() + queued
        tokens = (self.kv.num_free - claimed) * self.config.block_size
        return Credit(max(0, tokens), max(0, self.capacity().sequences - self.num_sequences))

    def capacity(self) -> Credit:
        """The credit when idle."""
        return Credit(self.config.pool_tokens, self.config.max_num_seqs + max(1, self.config.max_num_seqs // 8))

    def stats(self) -> EngineStats:
        """Gauges of this moment."""
        ledger = self.kv.ledger({s.seq: s.num_computed for s in self.running})
        return EngineStats(
            running=len(self.running),
            waiting=len(self.line),
            in_flight=len(self.in_flight),
            blocks_total=self.config.num_blocks - 1,
            blocks_used=self.kv.pool.num_held,
            slots_allocated=ledger.allocated,
            slots_used=ledger.used,
            slots_shared=ledger.shared,
            blocks_cached=self.kv.pool.num_used - self.kv.pool.num_held,
            backlog=sum(s.ahead for s in itertools.chain(self.running, self.line.waiting)),
            host_blocks_total=self.config.host_blocks,
            host_blocks_used=0 if self.kv.host is None else self.kv.host.num_used,
        )

    def check_integrity(self) -> None:
        """Raise unless tables, running set and requests agree."""
        self.kv.check_integrity()
        assert {s.seq for s in self.running} == set(self.kv.sequences), "tables and running set differ"
        assert self.running == sorted(self.running, key=_order)
        assert self.line.waiting == sorted(self.line.waiting, key=_order)
        counted: dict[int, int] = {}
        for launched in self.in_flight:
            for sequence in launched.sequences:
                counted[sequence.seq] = counted.get(sequence.seq, 0) + 1
        for sequence in [*self.running, *self.line.waiting]:
            assert sequence.in_flight == counted.get(sequence.seq, 0), f"sequence {sequence.seq} miscounts its plans"


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order
