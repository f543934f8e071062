"""Iteration-level scheduling (ORCA, Yu et al. 2022, algorithm 1), with paging and preemption in place of reservation.

schedule() makes the plan of the next iteration, update() takes in the result of an earlier one; several plans may be in flight.
Token counts are scheduled, not phases: in each iteration `num_computed` of a sequence moves towards its `num_tokens`, by many
tokens while its prompt is new, by one when it decodes. Every choice is made here and once; workers execute plans in order.

Who has a place and blocks, and who gives them up for others, is decided in cluster/running.py. A sequence in a launched plan keeps
its blocks until that plan has returned, whatever happens to it meanwhile.
"""

import itertools
from collections import deque
from collections.abc import Sequence as Tokens

from cluster.beams import Beam, BeamGroup, why_no_beams
from cluster.config import BatchConfig
from cluster.launched import Launched
from cluster.line import WaitingLine
from cluster.pace import Pace
from cluster.protocol import (
    Chunk,
    ChunkResult,
    Credit,
    EngineStats,
    FinishReason,
    Request,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenLogprobs,
)
from cluster.request import Scoring, Sequence, why_impossible
from cluster.running import Counters, RunningSet
from cluster.speculation import Speculation
from kv.manager import KVManager
from kv.radix import Key, PrefixMatch


class Batcher:
    """The running set, the waiting line and the plans in flight of one engine in one epoch."""

    def __init__(self, config: BatchConfig, kv: KVManager, epoch: int = 0) -> None:
        self.config = config
        self.kv = kv
        self.epoch = epoch
        self.line = WaitingLine()
        self.in_flight: deque[Launched] = deque()
        self._requests: dict[str, dict[int, Sequence]] = {}
        """By choice; those of beam searches are in the next."""
        self._groups: dict[str, BeamGroup] = {}
        self._forks: list[Beam] = []
        """New beams, each to fork the KV of its parent before that runs on."""
        self._set = RunningSet(config, kv, self.line)
        self._next_seq = 0
        self._next_step = 0
        self.pace = Pace(config)
        self.speculation = Speculation(config, self.pace.cost)

    @property
    def running(self) -> list[Sequence]:
        """In order of arrival; all have a block table."""
        return self._set.sequences

    @property
    def counters(self) -> Counters:
        """Running totals."""
        return self._set.counters

    # --- requests ---------------------------------------------------------------------------------------------------

    def why_impossible(self, request: Request) -> str | None:
        """The reason why `request` could never run here, or None."""
        reason = why_impossible(request, self.config.max_sequence_tokens)
        if reason is None and request.params.beam_width:
            reason = why_no_beams(request.params, self.config.max_num_seqs, self._set.forks)
        return reason

    def add(self, request: Request, now: float) -> Sequence:
        """Queue all choices of a request that `why_impossible` has nothing against. Returns the one that computes the prompt."""
        if request.params.beam_width:
            group = self._groups[request.id] = BeamGroup(request, self._number, now)
            self._stand_in_line(group.first)
            return group.first
        choices = [c for c in range(request.params.n) if not request.finished[c]]
        sequences: dict[int, Sequence] = {}
        scoring = Scoring(request.scored, 0 if request.params.prompt_logprobs is None else len(request.prompt))
        for choice in choices:
            sequence = Sequence(self._number(), request, choice, list(request.emitted[choice]), now, scoring)
            if self._set.forks and sequences:
                self.line.hold(sequence, sequences[choices[0]])
            else:
                self._stand_in_line(sequence)
            sequences[choice] = sequence
        self._requests[request.id] = sequences
        return sequences[choices[0]]

    def _number(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    def _stand_in_line(self, sequence: Sequence) -> None:
        sequence.expected = self.kv.known_tokens(self._set.match(sequence))
        self.line.join(sequence)

    def cancel(self, request: str, choices: list[int] | None = None) -> None:
        """Nobody waits for these choices (default: all) any more. Their blocks are freed when their plans have returned."""
        live = self._requests.get(request, {})
        for choice in list(live) if choices is None else choices:
            if choice in live:
                self._end(live[choice], "cancelled")
        if request in self._groups:
            group = self._groups[request]
            group.wanted.difference_update(group.wanted if choices is None else choices)
            if not group.wanted:
                self._end_group(group)

    def has_request(self, request: str) -> bool:
        """Whether at least one of its choices still runs or waits."""
        return request in self._requests or request in self._groups

    @property
    def num_sequences(self) -> int:
        """Sequences that still run or wait, and those that may come to run in the groups of beams."""
        return sum(len(live) for live in self._requests.values()) + sum(group.width for group in self._groups.values())

    # --- KV on its way from or to another engine (cluster/pulls.py) ---------------------------------------------

    def open_table(self, match: PrefixMatch, salt: str, num_tokens: int) -> int | None:
        """A table that is no sequence's: it holds the blocks of `match` that are in the pool, and new ones up to `num_tokens`. None
        if running sequences have a claim on those. They may be touched from outside once `last_step` has been run."""
        seq = self._number()
        return seq if self._set.open_table(seq, match, salt, num_tokens) else None

    @property
    def last_step(self) -> int:
        """The last step that may touch what is in no table any more: the last launched one, or the next if that stores something in
        host memory; -1 if there was none."""
        return self._next_step - 1 + self.kv.has_transfers

    def close_table(self, seq: int, key: Key = b"", num_tokens: int = 0) -> None:
        """End it. What it has of the first `num_tokens` of the packed tokens `key` can be found from now on."""
        self._set.close_table(seq, key, num_tokens)

    def set_aside(self, sequence: Sequence, num_tokens: int) -> None:
        """It waits for the KV of its first `num_tokens` tokens, not for a place."""
        sequence.expected = num_tokens
        self.line.set_aside(sequence)

    def bring_back(self, sequence: Sequence) -> None:
        """It waits for its place again, if anybody still waits for it."""
        if self.line.bring_back(sequence):
            sequence.expected = self.kv.known_tokens(self._set.match(sequence))

    # --- scheduling -------------------------------------------------------------------------------------------------

    @property
    def wants_plan(self) -> bool:
        """Whether one more plan may be in flight."""
        if len(self.in_flight) != self.config.shares:
            return len(self.in_flight) < self.config.shares
        return not self._groups and self.pace.runs_ahead(self.in_flight[-1], self.kv.num_free, len(self.running))

    def schedule(self, now: float) -> StepPlan | None:
        """The next iteration, launched: None if nothing can run now. Call while `wants_plan`."""
        self._end_static_batch()
        self.line.release(self._set.can_fork)
        plan = StepPlan(epoch=self.epoch, step=self._next_step, admitted=[], chunks=[], copies=[], finished=[])
        self.kv.begin_plan(plan.copies)
        chosen: list[Sequence] = []
        forks, self._forks = self._forks, []
        for beam in forks:
            if not self._set.fork(beam, plan):
                self._stand_in_line(beam)
        decodes = self._schedule_decodes(plan, chosen)
        known = itertools.chain(self.running, self.line.waiting)
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
                self.counters.stored += len(transfer.blocks)
            else:
                self.counters.loaded += len(transfer.blocks)

    def _schedule_decodes(self, plan: StepPlan, chosen: list[Sequence]) -> int:
        """At most ceil(running / shares), so that every stage has its share. Returns how many tokens they take."""
        most = -(-len(self.running) // self.config.shares)
        ahead = self.config.may_run_ahead and len(self.in_flight) == self.config.shares
        budget = self.config.max_num_batched_tokens
        if self.config.speculative_tokens:
            self.speculation.begin(self.running, most)
            if any(sequence.proposed for sequence in self.running):  # proposals leave prompts their share
                budget -= self.pace.reserved(itertools.chain(self.running, self.line.waiting))
        count = tokens = 0
        for sequence in list(self.running):
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
        if self.config.batching == "static" and any(s.finish is None for s in self.running):
            for sequence in self.running:
                if count < most and sequence.finish is not None and self._rerun(sequence, plan, chosen):
                    count, tokens = count + 1, tokens + 1
        return tokens

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
        places, free = self._set.free()
        while self.line.waiting and (budget > 0 or static):
            sequence = self.line.waiting[0]
            claim = self._set.claim(sequence)
            # What a group needs for its forks has to be free when it begins, unless nobody else runs.
            forks = self._set.margin * (claim - 1) if self.running else 0
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

    # --- results ----------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenDelta]:
        """Take in the result of the oldest plan in flight (see `expects`); returns what is new for the clients."""
        launched = self.in_flight.popleft()
        self.pace.ran(launched, result)
        if self.config.speculative_tokens:
            self.speculation.ran(launched, result)
        drawn = {r.seq: r for r in result.results}
        told = {s.seq: s for s in result.scores}
        deltas: list[TokenDelta] = []
        for chunk, sequence in zip(launched.plan.chunks, launched.sequences, strict=True):
            sequence.in_flight -= 1
            delta = sequence.news(told.get(chunk.seq))
            outcome: list[TokenDelta] = []
            wanted = self.has_request(delta.request)
            if sequence.finish is not None:
                if sequence.in_flight == 0:
                    self._leave(sequence)  # cancelled, or finished earlier, while plans held it
            elif isinstance(sequence, Beam):
                outcome = self._advance_beam(sequence, drawn[chunk.seq].logprobs[0]) if chunk.sample else []
            elif chunk.sample:
                delta.verified = self._verified(sequence, chunk, drawn[chunk.seq])
                self._advance(sequence, drawn[chunk.seq], delta)
            elif sequence.params.max_tokens == 0 and sequence.schedulable == 0 and sequence.in_flight == 0:
                delta.finish = "length"  # there was only the prompt to be told of
                self._end(sequence, "length")
            if delta.tokens or delta.finish is not None or (delta.prompt_logprobs and wanted):
                deltas.append(delta)
            deltas += outcome
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

    def _verified(self, sequence: Sequence, chunk: Chunk, result: ChunkResult) -> tuple[int, int] | None:
        """Only the proposals that stood were computed for good. Returns TokenDelta.verified."""
        sequence.proposed = list(result.proposed)
        stood = len(result.tokens) - 1
        if chunk.verify:
            sequence.num_computed -= chunk.verify - stood
            self.speculation.verified(sequence, chunk.verify, stood)
            self.counters.count_verified(chunk.verify, stood)
        return (chunk.verify, stood) if self.config.speculative_tokens else None

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

    def _advance_beam(self, beam: Beam, told: TokenLogprobs) -> list[TokenDelta]:
        """Take in what may come after one beam; the outcome of its group, if that was all it waited for."""
        group = beam.group
        if not group.take(beam, told):
            return []
        left, forked = group.turn()
        self._forks += forked
        for other in left:
            self._dismiss(other)
        if group.over:
            self._end_group(group)
            return group.outcome()
        for other in group.beams:
            if other.parent is None and not self.kv.holds(other.seq):
                self._stand_in_line(other)
        return []

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
            self._set.forget(sequence)
        elif sequence.in_flight == 0:
            self._leave(sequence)

    def _end_group(self, group: BeamGroup) -> None:
        """Nothing more of a beam search is wanted."""
        del self._groups[group.request.id]
        self._forks = [beam for beam in self._forks if beam.group is not group]
        for beam in group.beams:
            self._dismiss(beam)

    def _dismiss(self, beam: Beam) -> None:
        """It leaves, from wherever it is, as soon as no launched plan holds it."""
        beam.finish = "cancelled"
        if self.line.leave(beam) or not self.kv.holds(beam.seq):
            self._set.forget(beam)
        elif beam.in_flight == 0:
            self._set.release(beam)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running set; a static batch keeps its memory until the longest is done."""
        if self.config.batching == "continuous":
            self._set.release(sequence)

    def _end_static_batch(self) -> None:
        if self.config.batching != "continuous" and all(s.finish is not None and s.in_flight == 0 for s in self.running):
            for sequence in list(self.running):
                self._set.release(sequence)

    # --- readings ---------------------------------------------------------------------------------------------------

    def credit(self) -> Credit:
        """What could be taken besides all that was."""
        return self._set.credit(self.num_sequences)

    def capacity(self) -> Credit:
        """The credit when idle."""
        return self._set.capacity()

    def stats(self) -> EngineStats:
        """Gauges of this moment."""
        return self._set.stats(len(self.in_flight))

    def check_integrity(self) -> None:
        """Raise unless tables, running set and requests agree."""
        self.kv.check_integrity()
        assert {s.seq for s in self.running} | self._set.besides.keys() == self.kv.sequences, "tables and running set differ"
        assert self.running == sorted(self.running, key=_order)
        assert self.line.waiting == sorted(self.line.waiting, key=_order)
        counted: dict[int, int] = {}
        for launched in self.in_flight:
            for sequence in launched.sequences:
                counted[sequence.seq] = counted.get(sequence.seq, 0) + 1
        for sequence in [*self.running, *self.line.waiting]:
            assert sequence.in_flight == counted.get(sequence.seq, 0), f"sequence {sequence.seq} miscounts its plans"


def _order(sequence: Sequence) -> tuple[float, ...]:
    return sequence.order
