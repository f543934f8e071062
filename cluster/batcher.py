"""Iteration-level scheduling (ORCA, Yu et al. 2022, algorithm 1), with paging and preemption in place of reservation.

schedule() makes the plan of the next iteration (cluster/planner.py), update() takes in the result of an earlier one; several plans
may be in flight. Every choice is made here and once; workers execute plans in order.

Who has a place and blocks, and who gives them up for others, is decided in cluster/running.py. A sequence in a launched plan keeps
its blocks until that plan has returned, whatever happens to it meanwhile.
"""

from collections import deque

from cluster.beams import Beam, BeamGroup, why_no_beams
from cluster.config import BatchConfig
from cluster.launched import Launched
from cluster.line import WaitingLine
from cluster.planner import Planner
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
from kv.manager import KVManager
from kv.radix import Key, PrefixMatch


class Batcher:
    """The running set, the waiting line and the plans in flight of one engine in one epoch."""

    def __init__(self, config: BatchConfig, kv: KVManager, epoch: int = 0) -> None:
        self.config = config
        self.kv = kv
        self.epoch = epoch
        self.line = WaitingLine()
        self._requests: dict[str, dict[int, Sequence]] = {}
        """By choice; those of beam searches are in the next."""
        self._groups: dict[str, BeamGroup] = {}
        self._set = RunningSet(config, kv, self.line)
        self._next_seq = 0
        self.planner = Planner(config, kv, self.line, self._set, epoch)

    @property
    def running(self) -> list[Sequence]:
        """In order of arrival; all have a block table."""
        return self._set.sequences

    @property
    def in_flight(self) -> deque[Launched]:
        """Plans whose results are awaited, in order."""
        return self.planner.in_flight

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
            self._set.stand_in_line(group.first)
            return group.first
        choices = [c for c in range(request.params.n) if not request.finished[c]]
        sequences: dict[int, Sequence] = {}
        scoring = Scoring(request.scored, 0 if request.params.prompt_logprobs is None else len(request.prompt))
        for choice in choices:
            sequence = Sequence(self._number(), request, choice, list(request.emitted[choice]), now, scoring)
            if self._set.forks and sequences:
                self.line.hold(sequence, sequences[choices[0]])
            else:
                self._set.stand_in_line(sequence)
            sequences[choice] = sequence
        self._requests[request.id] = sequences
        return sequences[choices[0]]

    def _number(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

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
        return self.planner.last_step

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
        return self.planner.wants_plan(beams=bool(self._groups))

    def schedule(self, now: float) -> StepPlan | None:
        """The next iteration, launched: None if nothing can run now. Call while `wants_plan`."""
        self._end_static_batch()
        return self.planner.schedule(now)

    # --- results ----------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[TokenDelta]:
        """Take in the result of the oldest plan in flight (see `expects`); returns what is new for the clients."""
        launched = self.in_flight.popleft()
        self.planner.pace.ran(launched, result)
        if self.config.speculative_tokens:
            self.planner.speculation.ran(launched, result)
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
            self.planner.speculation.verified(sequence, chunk.verify, stood)
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
        self.planner.forks += forked
        for other in left:
            self._dismiss(other)
        if group.over:
            self._end_group(group)
            return group.outcome()
        for other in group.beams:
            if other.parent is None and not self.kv.holds(other.seq):
                self._set.stand_in_line(other)
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
        self.planner.forks = [beam for beam in self.planner.forks if beam.group is not group]
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
