"""What holds of every plan and every token, whatever is added and cancelled when: a Batcher on fake stages and nothing else."""

import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.batcher import Batcher
from cluster.beams import Beam
from cluster.config import BatchConfig
from cluster.protocol import Request, StepPlan, StepResult
from kv.manager import KVManager
from tests.cluster.messages import request
from tests.conftest import examples
from workers.fake import FakeStage, fake_beams, fake_output, fake_scores


@dataclass
class Rig:
    """A Batcher with its pipeline; results wait until they are taken."""

    batcher: Batcher
    stages: list[FakeStage]
    results: deque[StepResult] = field(default_factory=deque)
    asked: dict[str, Request] = field(default_factory=dict)
    given: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def launch(self, now: float) -> bool:
        b = self.batcher
        if not b.wants_plan:
            return False
        plan = checked_schedule(b, now)
        if plan is None:
            return False
        hidden: list[int] = []
        for stage in self.stages:
            hidden, answer = stage.execute(plan, hidden)
            if answer is not None:
                self.results.append(answer)
        check_ownership(b)
        check_writes(b)
        return True

    def take(self) -> None:
        for delta in self.batcher.update(self.results.popleft()):
            asked = self.asked[delta.request]
            scores = self.scores.setdefault(delta.request, [])
            if delta.prompt_logprobs:
                assert delta.prompt_index == 1 + len(scores), "prompt positions are told in order, each once"
                scores += [entry.logprob for entry in delta.prompt_logprobs]
            tokens = self.given.setdefault((delta.request, delta.choice), [])
            assert delta.index == len(tokens)
            tokens += delta.tokens
            if asked.params.beam_width:
                wanted = fake_beams(asked.prompt, asked.params, len(self.stages))[delta.choice]
                assert delta.finish is not None or not delta.tokens, "beams are told of at their end"
            else:
                wanted = fake_output(asked.prompt, asked.params, delta.choice, len(self.stages))
            assert tokens == wanted[: len(tokens)]
            if delta.tokens and not asked.params.beam_width:
                assert (delta.finish is not None) == (len(tokens) == len(wanted))
            elif delta.finish is not None:
                assert wanted == tokens
            told = fake_scores(asked.prompt, len(self.stages)) if asked.params.prompt_logprobs is not None else []
            assert scores == told[: len(scores)]
            assert len(scores) == len(told) or not (delta.tokens or delta.finish), "the prompt comes first"
        check_ownership(self.batcher)

    def drain(self) -> None:
        """To the end."""
        for _ in range(5000):
            while self.launch(100.0):
                pass
            if not self.results:
                break
            self.take()


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    config = BatchConfig(
        num_blocks=draw(st.integers(3, 20)),
        max_model_len=40,
        block_size=draw(st.sampled_from([1, 4])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 20)),
        pp=draw(st.sampled_from([1, 2, 4])),
        plans_in_flight=draw(st.sampled_from([None, None, None, 1, 3, 5])),
        run_ahead=draw(st.sampled_from(["on", "off"])),
        speculative_tokens=draw(st.sampled_from([0, 0, 1, 4])),
        batching=draw(st.sampled_from([*["continuous"] * 4, "static", "static-skip"])),
        reservation=draw(st.sampled_from([*["paged"] * 4, "max_tokens", "contiguous"])),
        prefix_cache=draw(st.sampled_from(["on", "on", "off"])),
        host_blocks=draw(st.sampled_from([0, 0, 1, 3, 8, 30])),
    )
    sizes = (config.num_blocks, config.block_size)
    stages = [FakeStage(i, config.pp, *sizes, host_blocks=config.host_blocks) for i in range(config.pp)]
    return Rig(Batcher(config, KVManager(config)), stages)


@examples(200)
@given(st.data(), rigs())
def test_invariants_of_every_plan(data: st.DataObject, rig: Rig) -> None:
    b = rig.batcher
    longest = b.config.max_sequence_tokens
    for now in range(data.draw(st.integers(1, 80))):
        action = data.draw(st.sampled_from(["add", "cancel", "launch", "launch", "take", "take"]))
        if action == "add" and longest > 1:
            prompt = data.draw(st.integers(1, longest - 1))
            room = longest - prompt
            asked = request(f"r{now}", prompt, data.draw(st.integers(0, room)), n=data.draw(st.sampled_from([1, 1, 3])))
            start = data.draw(st.sampled_from([now, 0, 0]))  # of its own, or beginning like others
            asked.prompt[:] = [*range(start, start + prompt - 1), data.draw(st.integers(0, 2))]
            asked.cache_salt = data.draw(st.sampled_from(["", "", "x"]))
            asked.params.prompt_logprobs = data.draw(st.sampled_from([None, 0]))
            forks = b.config.batching == "continuous" and b.config.reservation == "paged"
            if forks and asked.params.max_tokens and data.draw(st.booleans()):
                asked.params.beam_width = data.draw(st.integers(asked.params.n, max(asked.params.n, b.config.max_num_seqs)))
                asked.params.length_penalty = data.draw(st.sampled_from([1.0, 0.0, 2.0, -1.0]))
                asked.params.early_stopping = data.draw(st.booleans())
                asked.params.stop_token_ids = tuple(range(data.draw(st.sampled_from([0, 2, 300]))))
                asked.params.min_tokens = data.draw(st.sampled_from([0, 0, 3]))
            if asked.params.beam_width > b.config.max_num_seqs:
                assert b.why_impossible(asked) is not None
                continue
            rig.asked[asked.id] = asked
            assert b.why_impossible(asked) is None
            b.add(asked, float(now))
        elif action == "cancel" and rig.asked:
            b.cancel(data.draw(st.sampled_from(list(rig.asked))), data.draw(st.sampled_from([None, [0], [1, 2]])))
        elif action == "launch":
            rig.launch(float(now))
        elif action == "take" and rig.results:
            rig.take()
    rig.drain()
    b.schedule(100.0)
    assert (b.kv.pool.num_held, b.kv.num_free, b.num_sequences, len(b.line)) == (0, b.config.num_blocks - 1, 0, 0)


@examples(30)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.sampled_from([3, 12, 60]))
def test_tokens_of_sequences_whose_prefix_sank_and_came_back(seed: int, pp: int, host_blocks: int) -> None:
    """A few beginnings in turn, which the pool can't hold together, with n > 1, cancels and preemption."""
    drawn = random.Random(seed)
    config = BatchConfig(
        num_blocks=drawn.randint(8, 16),
        max_model_len=30,
        block_size=drawn.choice([2, 4]),
        max_num_seqs=drawn.randint(1, 4),
        max_num_batched_tokens=drawn.choice([8, 30]),
        pp=pp,
        run_ahead=drawn.choice(["on", "off"]),
        speculative_tokens=drawn.choice([0, 3]),
        host_blocks=host_blocks,
    )
    sizes = (config.num_blocks, config.block_size)
    rig = Rig(Batcher(config, KVManager(config)), [FakeStage(i, pp, *sizes, host_blocks=host_blocks) for i in range(pp)])
    longest = config.max_sequence_tokens
    stems = [drawn.choices(range(997), k=longest) for _ in range(5)]
    for now in range(60):
        asked = request(f"r{now}", drawn.randint(2, longest - 1), n=drawn.choice([1, 1, 1, 3]))
        asked.params.max_tokens = drawn.randint(0, min(6, longest - len(asked.prompt)))
        asked.prompt[:-1] = drawn.choice(stems)[: len(asked.prompt) - 1]
        rig.asked[asked.id] = asked
        rig.batcher.add(asked, float(now))
        if drawn.random() < 0.1:
            rig.batcher.cancel(drawn.choice(list(rig.asked)))
        for _ in range(drawn.randint(0, 12)):
            if not rig.launch(float(now)) and rig.results:
                rig.take()
    rig.drain()
    assert rig.batcher.num_sequences == rig.batcher.kv.pool.num_held == 0
    assert rig.batcher.counters.stored > rig.batcher.counters.loaded


def checked_schedule(b: Batcher, now: float) -> StepPlan | None:
    drawing = {c.seq: c for launched in b.in_flight for c in launched.plan.chunks if c.sample}
    left = {s.seq: s.params.max_tokens - len(s.emitted) for s in b.running if not isinstance(s, Beam)}
    line = {s.seq for s in b.line.waiting}
    known = {s.seq for s in b.running}
    running = len(b.running)
    plan = b.schedule(now)
    if plan is None:
        return None
    forks = [a for a in plan.admitted if a.parent is not None]
    most = -(-(running + len(forks)) // b.config.shares)
    seqs = [c.seq for c in plan.chunks]
    assert len(seqs) == len(set(seqs)), "two chunks of one sequence"
    for chunk in plan.chunks:
        if before := drawing.get(chunk.seq):
            assert b.config.may_run_ahead, "its next token is still being drawn"
            assert (chunk.start, chunk.num_tokens, chunk.tokens) == (before.start + before.num_tokens, 1, []), "not that token's"
            assert left[chunk.seq] > 1, "there will be no such token"
    assert sum(c.num_tokens for c in plan.chunks) <= b.config.max_num_batched_tokens
    assert len(b.running) <= b.config.max_num_seqs
    decodes = [c for c in plan.chunks if c.seq in known and c.num_tokens == 1 + c.verify and c.sample]
    assert all(c.verify <= b.config.speculative_tokens for c in plan.chunks)
    prefill_of_one = 1  # the last token of a prompt that the budget cut
    assert len(decodes) <= most + prefill_of_one, "more than its share of decodes"
    groups = {s.group: s.group.width for s in b.running if isinstance(s, Beam)}
    places = sum(not isinstance(s, Beam) for s in b.running) + sum(groups.values())
    assert places <= b.config.max_num_seqs, "a group's beams may come to more than there is room for"
    admitted = {a.seq for a in plan.admitted if a.parent is None}
    last = max((s.order for s in b.running if s.seq in admitted), default=(-1.0, -1))
    assert all(s.order > last for s in b.line.waiting if s.seq in line), "somebody was overtaken"
    return plan


def check_writes(b: Batcher) -> None:
    """The newest plan writes into blocks of one table each, but for those that it computes and shares at once."""
    size = b.config.block_size
    newest = b.in_flight[-1]
    for chunk, sequence in zip(newest.plan.chunks, newest.sequences, strict=True):
        for block in b.kv.table(sequence.seq)[chunk.start // size : -(-(chunk.start + chunk.num_tokens) // size)]:
            assert block in b.kv._fresh or (b.kv.pool.references(block) == 1 and not b.kv.pool.is_kept(block))


def check_ownership(b: Batcher) -> None:
    """No block of a launched plan is given away, and nobody writes into a block that another table holds."""
    b.check_integrity()
    size = b.config.block_size
    for launched in b.in_flight:
        written: set[int] = set()
        for chunk, sequence in zip(launched.plan.chunks, launched.sequences, strict=True):
            assert b.kv.holds(sequence.seq), "a sequence in a launched plan lost its blocks"
            blocks = b.kv.table(sequence.seq)[chunk.start // size : -(-(chunk.start + chunk.num_tokens) // size)]
            assert not written & set(blocks), "two sequences write into one block in one iteration"
            written |= set(blocks)
