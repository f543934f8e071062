"""The running set of one engine: who has a place and blocks, who gets them next, and who gives them up for others.

    waiting --enter--> running --release--> gone
       ^                  |
       +---- preempt -----+      (its blocks are freed; computed again later)

A group of beams takes the places of all beams that it may come to, from its first one on: then its forks always have one.
"""

import bisect
import itertools
from collections import Counter
from dataclasses import dataclass, field, fields

from cluster.beams import Beam
from cluster.config import BatchConfig
from cluster.line import WaitingLine
from cluster.protocol import Admission, Credit, EngineStats, StepPlan
from cluster.request import Sequence
from kv.manager import Beginning, KVManager
from kv.radix import NO_MATCH, Key, PrefixMatch


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
    verified: int = 0
    """Chunks with proposed tokens ..."""
    proposed: int = 0
    """... these tokens ..."""
    accepted: int = 0
    """... and of these, the ones that stood."""
    tried_at: Counter[int] = field(default_factory=Counter)
    """By place in its chunk, from 0: proposed tokens before which all others stood ..."""
    accepted_at: Counter[int] = field(default_factory=Counter)
    """... and of these, the ones that stood too."""

    def count_verified(self, proposed: int, stood: int) -> None:
        """The first `stood` of so many proposed tokens stood."""
        self.verified += 1
        self.proposed += proposed
        self.accepted += stood
        self.tried_at.update(range(min(proposed, stood + 1)))
        self.accepted_at.update(range(stood))

    def __add__(self, other: "Counters") -> "Counters":
        """Of both."""
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class RunningSet:
    """Sequences that have a block table, in order of arrival. Those that lose it go back to the waiting line."""

    def __init__(self, config: BatchConfig, kv: KVManager, line: WaitingLine) -> None:
        self.config = config
        self.kv = kv
        self.line = line
        self.sequences: list[Sequence] = []
        self.counters = Counters()
        self.gone: list[int] = []
        """Sequences the workers may forget with the next plan."""
        self.besides: dict[int, int] = {}
        """Tables that are no sequence's: their tokens."""
        self.forks = config.reservation == "paged" and config.batching == "continuous"
        """Sequences of one request can share KV."""
        self.margin = 1 if config.reservation == "paged" else 0
        """Blocks to keep free for each place: with paging, the next one to decode into."""

    # --- room -------------------------------------------------------------------------------------------------------

    def claim(self, sequence: Sequence) -> int:
        """Places that `sequence` takes when it enters: the first beam of a group those of all."""
        if not isinstance(sequence, Beam):
            return 1
        return 0 if any(self.kv.holds(beam.seq) for beam in sequence.group.beams) else sequence.group.width

    def free(self) -> tuple[int, int]:
        """Places and blocks that nobody has a claim on."""
        return self.config.max_num_seqs - self._places(), self.kv.num_free - self.promised()

    def promised(self) -> int:
        """Blocks that the running sequences will take soon: the rest of their prompts, and the margin."""
        if self.config.reservation != "paged":
            return 0
        known = sum(max(0, self.kv.blocks_for(s.num_tokens) - len(self.kv.table(s.seq))) for s in self.sequences)
        return known + self.margin * self._places()

    def _places(self) -> int:
        """Those that are taken."""
        groups = {s.group for s in self.sequences if isinstance(s, Beam)}
        return sum(not isinstance(s, Beam) for s in self.sequences) + sum(group.width for group in groups)

    # --- entering ---------------------------------------------------------------------------------------------------

    def stand_in_line(self, sequence: Sequence) -> None:
        """It waits for a place."""
        sequence.expected = self.kv.known_tokens(self.match(sequence))
        self.line.join(sequence)

    def enter(self, sequence: Sequence, plan: StepPlan, free: int) -> int | None:
        """Give `sequence` a block table if the `free` blocks hold all of its known tokens; returns how many it will take soon."""
        parent = sequence.parent
        if parent is not None and self.can_fork(parent):
            shared = len(sequence.request.prompt) - 1
            taken = self.kv.blocks_for(sequence.num_tokens) - shared // self.config.block_size
            beginning = self.kv.fork(parent.seq, sequence.seq, shared) if taken <= free else None
            sequence.cached = parent.cached
        else:
            match = self.match(sequence)
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
        new = None if sequence.sent else sequence.introduction()
        self._place(sequence, beginning, plan, Admission(sequence.seq, beginning.num_tokens, [], new))
        return taken

    def fork(self, beam: Beam, plan: StepPlan) -> bool:
        """Give a new beam the KV of its parent, whose next token is not its own. False if that is gone, or there is no room."""
        parent, beam.parent = beam.parent, None
        assert parent is not None
        while self.kv.holds(parent.seq):
            beginning = self.kv.fork(parent.seq, beam.seq, beam.num_tokens - 1)
            if beginning is not None:
                beam.cached, beam.started_at = parent.cached, parent.started_at
                self._place(beam, beginning, plan, Admission(beam.seq, beginning.num_tokens, [], parent=parent.seq))
                return True
            if not self.make_room(beam):
                break
        return False

    def _place(self, sequence: Sequence, beginning: Beginning, plan: StepPlan, admission: Admission) -> None:
        if beginning.copy is not None:
            plan.copies.append(beginning.copy)
        admission.blocks.extend(self.kv.table(sequence.seq))
        plan.admitted.append(admission)
        sequence.num_computed, sequence.parent, sequence.sent = beginning.num_tokens, None, True
        bisect.insort(self.sequences, sequence, key=_order)

    def match(self, sequence: Sequence) -> PrefixMatch:
        """What the prefix cache has of it."""
        return self.kv.match(sequence.key, sequence.request.cache_salt) if sequence.scoring.complete else NO_MATCH

    def can_fork(self, parent: Sequence) -> bool:
        """Whether the KV of its prompt is there, or will be when all launched plans have run."""
        return self.kv.holds(parent.seq) and parent.num_computed >= len(parent.request.prompt) - 1

    # --- leaving ----------------------------------------------------------------------------------------------------

    def make_room(self, sequence: Sequence) -> bool:
        """Free the blocks of one sequence that is in no launched plan, nor in the one being made: a finished one that a static
        batch holds, else the youngest that arrived after `sequence`, else a beam whose group can't go on before `sequence` or one
        that waits. False if there is none."""
        idle = [s for s in self.sequences if s.in_flight == 0 and s is not sequence]
        done = next((s for s in idle if s.finish is not None), None)
        if done is not None:
            self.release(done)
            return True
        victim = idle[-1] if idle and idle[-1].order > sequence.order else self.stalled(sequence)
        if victim is None:
            return False
        self.preempt(victim)
        return True

    def stalled(self, sequence: Sequence) -> Beam | None:
        """The youngest beam that only holds its KV while its group waits for `sequence`, or for another beam that has no place."""
        beams = (s for s in reversed(self.sequences) if isinstance(s, Beam) and s.drawn is not None)
        return next((beam for beam in beams if beam.group.waits_for(sequence, self.kv.holds)), None)

    def preempt(self, victim: Sequence) -> None:
        """Its place and its blocks are wanted for others."""
        self._give_back(victim)
        victim.num_computed, victim.proposed = 0, []
        victim.speculated.read, victim.speculated.trying = 0, False
        self.counters.preemptions += 1
        if isinstance(victim, Beam) and victim.drawn is not None:
            return  # there is nothing to compute before its group's next round
        self.line.join(victim)
        self.line.recall(victim)

    def release(self, sequence: Sequence) -> None:
        """It has ended."""
        self._give_back(sequence)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It has ended, and has no place."""
        if sequence.sent:
            self.gone.append(sequence.seq)

    def _give_back(self, sequence: Sequence) -> None:
        """The prefix cache keeps the KV of its whole blocks, as long as there is room."""
        self.sequences.remove(sequence)
        self.kv.release(sequence.seq, sequence.key, min(sequence.num_computed, sequence.num_tokens))

    # --- besides ----------------------------------------------------------------------------------------------------

    def open_table(self, seq: int, match: PrefixMatch, salt: str, num_tokens: int) -> bool:
        """A table `seq` that is no sequence's: it holds the blocks of `match` that are in the pool, and new ones up to
        `num_tokens`. False if running sequences have a claim on those."""
        taken = self.kv.blocks_for(num_tokens) - len(match.blocks) + match.idle
        if taken > self.kv.num_free - self.promised():
            return False
        self.kv.hold(seq, match, salt)
        self.kv.allocate(seq, num_tokens)
        self.besides[seq] = num_tokens
        return True

    def close_table(self, seq: int, key: Key, num_tokens: int) -> None:
        """End it. What it has of the first `num_tokens` of the packed tokens `key` can be found from now on."""
        del self.besides[seq]
        self.kv.release(seq, key, num_tokens)

    # --- readings ---------------------------------------------------------------------------------------------------

    def credit(self, num_sequences: int) -> Credit:
        """What could be taken besides all that was, `num_sequences` of them: free slots nobody has a claim on, and sequences.

        A few sequences more than run are asked for, so that a next one is here when a place falls free.
        """
        queued = sum(self.kv.blocks_to_admit(s.num_tokens, s.max_num_tokens) for s in self.line.everyone())
        queued -= sum(s.expected // self.config.block_size for s in self.line.aside)  # these blocks are in a table already
        tokens = (self.kv.num_free - self.promised() - queued) * self.config.block_size
        return Credit(max(0, tokens), max(0, self.capacity().sequences - num_sequences))

    def capacity(self) -> Credit:
        """The credit when idle."""
        return Credit(self.config.pool_tokens, self.config.max_num_seqs + max(1, self.config.max_num_seqs // 8))

    def stats(self, in_flight: int) -> EngineStats:
        """Gauges of this moment."""
        ledger = self.kv.ledger({s.seq: s.num_computed for s in self.sequences} | self.besides)
        return EngineStats(
            running=len(self.sequences),
            waiting=len(self.line),
            in_flight=in_flight,
            blocks_total=self.config.num_blocks - 1,
            blocks_used=self.kv.pool.num_held,
            slots_allocated=ledger.allocated,
            slots_used=ledger.used,
            slots_shared=ledger.shared,
            blocks_cached=self.kv.pool.num_used - self.kv.pool.num_held,
            backlog=sum(s.ahead for s in itertools.chain(self.sequences, self.line.waiting, self.line.aside)),
            host_blocks_total=self.config.host_blocks,
            host_blocks_used=0 if self.kv.host is None else self.kv.host.num_used,
        )


def _order(sequence: Sequence) -> tuple[float, ...]:
    return sequence.order
