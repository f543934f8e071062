"""KV pulled from another engine, one case at a time: what the request is told and what is left behind."""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable

import pytest

from cluster.actions import KillWorkers, Send
from cluster.config import BatchConfig
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.protocol import (
    Cancel,
    Deltas,
    Give,
    Moved,
    Pong,
    Pull,
    Pulled,
    PullSource,
    Request,
    SamplingParams,
    StepPlan,
    Submit,
    Take,
    TokenDelta,
    WorkerReady,
)
from cluster.worth import Worth
from workers.fake import FakeStage, fake_output

BATCH = BatchConfig(num_blocks=33, max_model_len=200, block_size=4, max_num_seqs=4, max_num_batched_tokens=64)
PROMPT = list(range(100, 142))
"""Ten blocks and two tokens."""
EPOCH = 10


def asked(id: str = "r", prompt: list[int] = PROMPT, n: int = 1) -> Request:
    params = SamplingParams(seed=1, max_tokens=4, n=n)
    return Request(id=id, attempt=0, reply_to="router", prompt=prompt, emitted=[[]] * n, finished=[False] * n, params=params)


class Pair:
    """Engines a (which is asked first) and b, with a fake worker each, in one process. Messages arrive at once, or are `held`."""

    def __init__(self, layout_of_b: str = "same", batch: BatchConfig = BATCH) -> None:
        self.now = 0.0
        self.batch = batch
        sizes = (batch.num_blocks, batch.block_size)
        self.stages = {name: FakeStage(0, 1, *sizes, host_blocks=batch.host_blocks) for name in "ab"}
        self.hold: Callable[[object], bool] = lambda message: False
        self.held: list[tuple[str, object]] = []
        self.moving: list[tuple[str, Give | Take]] = []
        self.deltas: list[TokenDelta] = []
        self.killed: list[str] = []
        self._queue: deque[tuple[str, object]] = deque()
        self.engines = {}
        for name in "ab":
            config = EngineConfig(name, name, "scheduler", batch, worker_timeout_s=1e6, step_timeout_s=1e6, pull_timeout_s=5.0)
            self.engines[name] = Engine(config, EPOCH, 0.0)
            layout = layout_of_b if name == "b" else "same"
            self.send(
                name,
                WorkerReady(
                    epoch=EPOCH,
                    rank=0,
                    address=f"{name}/0",
                    num_blocks=batch.num_blocks,
                    max_model_len=batch.max_model_len,
                    layout=layout,
                    store=f"{name}:1",
                    host_blocks=batch.host_blocks,
                ),
            )

    def send(self, target: str, message: object) -> None:
        """And all that comes of it."""
        self._queue.append((target, message))
        while self._queue:
            target, message = self._queue.popleft()
            if self.hold(message):
                self.held.append((target, message))
            else:
                self._deliver(target, message)

    def _deliver(self, target: str, message: object) -> None:
        if target in self.engines:
            self.engines[target].receive(message, self.now)  # type: ignore[arg-type]
            self._carry_out(target)
        elif isinstance(message, Deltas):
            self.deltas += message.deltas
        elif isinstance(message, StepPlan):
            _, result = self.stages[target[0]].execute(message, [])
            self._queue.append((target[0], result))
        elif isinstance(message, Give | Take):
            self.moving.append((target[0], message))

    def _carry_out(self, name: str) -> None:
        for action in self.engines[name].take_actions():
            match action:
                case Send():
                    self._queue.append((action.address, action.message))
                case KillWorkers():
                    self.killed.append(action.reason)

    def let_go(self) -> None:
        """What was held arrives."""
        self.hold, held, self.held = lambda message: False, self.held, []
        for target, message in held:
            self.send(target, message)

    def tick(self, now: float) -> None:
        while self.now < now:
            self.now = min(now, self.now + 1.0)
            for name, engine in self.engines.items():
                engine.receive(Pong(EPOCH, 0), self.now)
                engine.tick(self.now)
                self._carry_out(name)
                self.send(name, Pong(EPOCH, 0))

    def move(self, error: str = "") -> None:
        """The two ranks do what they were told: all of it, or half."""
        (giver, give), (taker, take) = sorted(self.moving, key=lambda end: isinstance(end[1], Take))
        assert (give.pull, give.store, len(give.blocks)) == (take.pull, take.store, len(take.blocks))
        assert (give.peer, take.peer) == (f"b.{EPOCH}", f"a.{EPOCH}")
        content = self.stages[giver].read(give.blocks)
        count = len(content) // 2 if error else len(content)
        self.stages[taker].write(take.blocks[:count], content[:count])
        self.moving = []
        for name, order in ((giver, give), (taker, take)):
            self.send(name, Moved(epoch=order.epoch, rank=0, pull=order.pull, seconds=0.01, error=error))

    def ask(self, engine: str, request: Request, source: PullSource | None = None) -> None:
        self.send(engine, Submit(EPOCH, request, source))

    def pull(self, blocks: int = 10, request: Request | None = None) -> None:
        """a has the prompt; b is asked, and told that a has so much of it."""
        if not self.deltas:
            self.ask("a", asked("first"))
            self.deltas.clear()
        self.ask("b", request or asked(), PullSource("a", EPOCH, "a", blocks))

    def outcomes(self) -> Counter[str]:
        return self.engines["b"].metrics.pulls.ended

    def check(self, cached: int, request: Request | None = None) -> None:
        """b has answered rightly, with so much of the prompt from the cache, and nothing is left of it."""
        request = request or asked()
        for choice in range(request.params.n):
            news = [delta for delta in self.deltas if (delta.request, delta.choice) == (request.id, choice)]
            assert [token for delta in news for token in delta.tokens] == fake_output(request.prompt, request.params, choice, 1)
            if choice == 0:
                assert news[0].cached_tokens == cached
        self.check_empty()

    def check_empty(self) -> None:
        for engine in self.engines.values():
            assert engine.batcher is not None
            engine.batcher.check_integrity()
            stats = engine.batcher.stats()
            assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)


def test_a_prefix_is_pulled_and_then_found() -> None:
    pair = Pair()
    pair.pull()
    assert not pair.deltas, "the request waits"
    assert pair.engines["b"].batcher is not None
    assert pair.engines["b"].batcher.stats().waiting == 1
    pair.move()
    pair.check(cached=40)
    assert pair.outcomes() == Counter(done=1)
    counts = pair.engines["b"].metrics.pulls, pair.engines["a"].metrics.pulls
    assert (counts[0].tokens, counts[0].loans, counts[1].tokens, counts[1].loans) == (40, 0, 0, 1)
    samples = {(s.name, dict(s.labels).get("outcome")): s.value for s in pair.engines["b"].metrics.samples("b")}
    assert samples["rayline:kv_pulls_total", "done"] == 1.0
    assert samples["rayline:kv_pulled_tokens_total", None] == 40.0


def test_only_what_is_missing_is_pulled() -> None:
    pair = Pair()
    pair.ask("b", asked("stem", PROMPT[:20]))
    pair.deltas.clear()
    pair.pull()
    assert [len(order.blocks) for _, order in pair.moving] == [5, 5]
    pair.move()
    pair.check(cached=40)
    assert pair.engines["b"].metrics.pulls.tokens == 20


def test_the_source_may_have_less_than_was_thought() -> None:
    pair = Pair()
    pair.ask("a", asked("stem", PROMPT[:26]))
    pair.deltas.append(TokenDelta(request="", attempt=0, choice=0, index=0, tokens=[]))
    pair.pull()
    assert [len(order.blocks) for _, order in pair.moving] == [6, 6]
    pair.move()
    pair.check(cached=24)


@pytest.mark.parametrize("n", [2, 5])
def test_choices_wait_with_the_first_one(n: int) -> None:
    pair = Pair()
    pair.pull(request=asked(n=n))
    assert not pair.deltas
    pair.move()
    pair.check(cached=40, request=asked(n=n))


def test_a_transfer_that_fails_is_computed() -> None:
    pair = Pair()
    pair.pull()
    pair.move(error="broken")
    pair.check(cached=0)
    assert pair.outcomes() == Counter(failed=1)
    pair.pull(request=asked("again", [*PROMPT, 5]))
    assert not pair.moving, "its source is not asked again so soon"


def test_a_request_is_not_kept_waiting_for_ever() -> None:
    pair = Pair()
    pair.pull()
    pair.tick(4.0)
    assert not pair.deltas
    pair.tick(7.0)
    assert pair.outcomes() == Counter(late=1)
    assert pair.deltas[-1].finish is not None
    assert pair.engines["b"].batcher is not None
    assert pair.engines["b"].batcher.stats().blocks_used == 10, "the ranks may still write"
    pair.move()
    pair.check(cached=0)


def test_a_request_waits_no_longer_than_it_would_take_to_compute_and_the_kv_is_kept() -> None:
    pair = Pair()
    pulls = pair.engines["b"]._epoch.pulls
    assert pulls is not None
    pulls.worth.computed(1000, 10.0)
    pair.pull()
    pair.tick(0.8)
    assert not pair.deltas, "40 tokens take 0.4 s"
    pair.tick(1.0)
    assert pair.outcomes() == Counter(late=1)
    assert pair.deltas[0].cached_tokens == 0
    pair.move()
    pair.check_empty()
    assert pair.engines["b"].metrics.pulls.tokens == 40
    again = asked("again", [*PROMPT, 3])
    pair.deltas.clear()
    pair.ask("b", again)
    pair.check(cached=42, request=again)


def test_ranks_that_never_say_what_became_of_it_end_the_epoch() -> None:
    pair = Pair()
    pair.pull()
    pair.tick(19.0)
    assert not pair.killed
    pair.tick(22.0)
    assert [reason.split(".")[0] for reason in pair.killed] == ["no word of the transfer b"] * 2


def test_nothing_is_read_or_written_before_the_plans_that_were_launched_have_run() -> None:
    """The source has only just been given the same prompt: its plan is on its way. So is one of the destination."""
    pair = Pair()
    pair.ask("b", asked("b's own", [1, 2, 3]))
    pair.hold = lambda message: isinstance(message, StepPlan)
    pair.ask("a", asked("first"))
    pair.ask("b", asked("another", [4, 5, 6]))
    pair.deltas.append(TokenDelta(request="", attempt=0, choice=0, index=0, tokens=[]))
    pair.pull()
    ((_, of_a), (_, of_b)) = pair.held
    assert isinstance(of_a, StepPlan)
    assert isinstance(of_b, StepPlan)
    assert {type(order): order.after for _, order in pair.moving} == {Give: of_a.step, Take: of_b.step}
    pair.let_go()
    pair.move()
    pair.check(cached=40)


def test_nothing_is_written_before_what_was_there_is_in_host_memory() -> None:
    """The pool of b is full of another prompt, which goes to the host for the pulled one, and is brought back afterwards."""
    pair = Pair(batch=dataclasses.replace(BATCH, num_blocks=14, host_blocks=20))
    other = asked("other", PROMPT[::-1])
    pair.ask("b", other)
    pair.deltas.clear()
    pair.hold = lambda message: isinstance(message, StepPlan) and bool(message.transfers)
    pair.pull()
    ((_, plan),) = pair.held
    assert isinstance(plan, StepPlan)
    assert not plan.chunks, "there is nothing else to do"
    assert {type(order): order.after for _, order in pair.moving}[Take] == plan.step
    pair.let_go()
    pair.move()
    pair.check(cached=40)
    pair.deltas.clear()
    again = asked("again", other.prompt)
    pair.ask("b", again)
    pair.check(cached=40, request=again)


def test_a_plan_that_is_not_yet_launched_stores_first() -> None:
    """As many plans as may be are in flight, so that the next one has to wait, and the ranks for that one."""
    pair = Pair(batch=dataclasses.replace(BATCH, num_blocks=14, host_blocks=20))
    pair.ask("b", asked("other", PROMPT[::-1]))
    pair.deltas.clear()
    pair.ask("a", asked("first"))
    pair.deltas.clear()
    pair.hold = lambda message: isinstance(message, StepPlan)
    pair.ask("b", asked("small", [1, 2, 3]))
    ((_, plan),) = pair.held
    assert isinstance(plan, StepPlan)
    pair.ask("b", asked(), PullSource("a", EPOCH, "a", 10))
    assert {type(order): order.after for _, order in pair.moving}[Take] == plan.step + 1
    pair.let_go()
    pair.move()
    pair.check(cached=40)


def test_others_wait_for_the_same_pull() -> None:
    """They would else compute what comes, and be done before the one that waits."""
    pair = Pair()
    pair.pull()
    longer, shorter, salted = asked("longer", [*PROMPT, 7, 8]), asked("shorter", PROMPT[:21]), asked("salted")
    salted.cache_salt = "x"
    for request in (longer, shorter, salted):
        pair.ask("b", request)
    assert {delta.request for delta in pair.deltas} == {"salted"}
    pair.move()
    for request, cached in ((asked(), 40), (longer, 40), (shorter, 20), (salted, 0)):
        pair.check(cached, request)
    assert pair.outcomes() == Counter(done=1)


def test_what_waits_for_a_pull_is_counted_once() -> None:
    pair = Pair()
    batcher = pair.engines["b"].batcher
    assert batcher is not None
    idle = batcher.credit().tokens
    pair.pull()
    assert idle - batcher.credit().tokens == 44, "the blocks of 42 tokens"
    assert batcher.stats().backlog == 2
    pair.move()
    pair.check(cached=40)


@pytest.mark.parametrize("when", ["asked", "coming"])
def test_a_client_that_leaves_frees_everything_in_the_end(when: str) -> None:
    pair = Pair()
    if when == "asked":
        pair.hold = lambda message: isinstance(message, Pulled)
    pair.pull()
    pair.send("b", Cancel(request="r", attempt=0, choices=[0]))
    pair.let_go()
    pair.move()
    pair.check_empty()
    pair.ask("b", asked("next"))
    pair.check(cached=40, request=asked("next"))


def test_other_layouts_refuse_and_are_not_asked_again() -> None:
    pair = Pair(layout_of_b="another tp")
    pair.pull()
    assert not pair.moving
    pair.check(cached=0)
    pair.pull(request=asked("again", [0, *PROMPT]))
    assert pair.outcomes() == Counter(layout=1)


@pytest.mark.parametrize("prompt", [[9, *PROMPT], PROMPT[:10]])
def test_what_is_not_there_or_not_worth_it_is_not_pulled(prompt: list[int]) -> None:
    pair = Pair()
    pair.pull(request=asked("r", prompt))
    assert not pair.moving
    pair.check(cached=0, request=asked("r", prompt))


def test_another_epoch_has_nothing() -> None:
    pair = Pair()
    pair.ask("a", asked("first"))
    pair.deltas.clear()
    pair.ask("b", asked(), PullSource("a", EPOCH - 1, "a", 10))
    pair.check(cached=0)
    assert pair.outcomes() == Counter(gone=1)


def test_a_full_pool_is_not_filled_for_it() -> None:
    """Blocks that running sequences have a claim on are not taken."""
    pair = Pair(batch=BatchConfig(num_blocks=14, max_model_len=52, block_size=4, max_num_seqs=4, max_num_batched_tokens=64))
    pair.ask("a", asked("first"))
    pair.deltas.clear()
    pair.hold = lambda message: isinstance(message, StepPlan)
    pair.ask("b", asked("other", PROMPT[::-1][:30]))
    pair.ask("b", asked(), PullSource("a", EPOCH, "a", 10))
    assert not pair.moving
    pair.let_go()
    pair.check(cached=0)


def test_only_so_many_at_a_time() -> None:
    pair = Pair(batch=BatchConfig(num_blocks=400, max_model_len=52, block_size=4, max_num_seqs=4, max_num_batched_tokens=64))
    stems = [[number, *PROMPT[1:]] for number in range(10)]
    for number, stem in enumerate(stems):
        pair.ask("a", asked(f"first{number}", stem))
    pair.deltas.clear()
    for number, stem in enumerate(stems):
        pair.ask("b", asked(f"r{number}", stem), PullSource("a", EPOCH, "a", 10))
    assert len(pair.moving) == 16
    assert {delta.request for delta in pair.deltas} == {"r8", "r9"}, "they do not wait"


def test_worth() -> None:
    worth = Worth()
    assert worth.pays(100, 0.0), "nothing is known"
    worth.tried(0.0)
    worth.computed(1000, 1.0)
    worth.computed(8, 1e9)  # a decode says nothing of prompts
    worth.moved(1000, 0.1, 0.15)
    assert worth.pays(100, 1.0)
    assert not worth.pays(50, 2.0), "0.05 s to wait, 0.05 s to compute"
    assert worth.pays(100, 3.0)
    for _ in range(50):
        worth.moved(1000, 2.0, 2.0)
    assert not worth.pays(1000, 3.0)
    assert worth.pays(1000, 40.0), "it is tried again some time"


def test_messages_for_nobody_are_no_harm() -> None:
    pair = Pair()
    pull = Pull(pull="x", epoch=3, peer="z.1", reply_to="z", tokens=b"", salt="", first_block=0, layout=[], stores=[])
    for message in (pull, Pulled("x", 3), Moved(epoch=EPOCH, rank=0, pull="x", seconds=0.0)):
        pair.send("a", message)
    pair.check_empty()
