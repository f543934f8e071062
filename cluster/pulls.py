"""KV that an engine pulls from others, and that it gives to them. No I/O: part of the engine's state machine for one epoch.

A request whose prompt another engine has more of waits as *fetching*, outside of all plans, while the blocks come. Then they are
put into the radix tree, the request joins the waiting line at its place, and finds them there as it would find any other prefix.
Whatever goes wrong on the way: it joins the line without them, and they are computed again.

Blocks that a transfer writes or reads belong to a table of their own. The table of a pull holds the blocks before those that
are to come, so that they are not evicted meanwhile; that of a loan is the source's lease. Both are kept until every rank has said
that it touches them no more, however long ago the request has stopped waiting: a rank's transfer ends within a bounded time.
"""

from collections import Counter
from dataclasses import dataclass, field

from cluster.actions import Send
from cluster.batcher import Batcher
from cluster.protocol import EngineMessage, Give, Moved, Pull, Pulled, PullRefusal, PullSource, Take, WorkerMessage, WorkerReady
from cluster.request import Sequence
from cluster.worth import Worth
from kv.names import TOKEN_BYTES

LEAST_BLOCKS = 4
"""Fewer are not worth the messages."""
_MOST = 8
"""Pulls at a time, and loans."""
_SHUNNED_S = 30.0
"""An engine from which nothing came is not asked again for so long."""


@dataclass
class PullCounts:
    """Running totals of an engine's process."""

    ended: Counter[str] = field(default_factory=Counter)
    """Pulls by how they ended: done, gone, layout, busy, failed, late."""
    tokens: int = 0
    """Whose KV has come."""
    seconds: float = 0.0
    """That this took, from asking to having it."""
    loans: int = 0


@dataclass
class _Pull:
    name: str
    sequence: Sequence | None
    """That waits for it."""
    source: PullSource
    seq: int
    """Of the table."""
    key: bytes
    """The packed tokens of all blocks wanted, and one more."""
    first: int
    """Blocks that were here already."""
    end: int
    began: float
    patience_s: float
    """The request waits no longer."""
    after: int = -1
    """The step whose result says that nobody reads from its blocks any more what was in them; -1: nobody does."""
    answered: bool = False
    """The source has said that the blocks come."""
    ranks: set[int] = field(default_factory=set)
    """Of which word is awaited."""
    seconds: float = 0.0
    failed: bool = False

    @property
    def peer(self) -> str:
        return f"{self.source.engine}.{self.source.epoch}"


@dataclass
class _Loan:
    request: Pull
    seq: int
    blocks: list[int]
    after: int
    """The step whose result says that all of the blocks are written."""
    began: float
    ranks: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.request.pull


class Pulls:
    """Feed it with pull(), receive(), returned() and tick(); send what take_sends() returns."""

    def __init__(
        self,
        engine: str,
        epoch: int,
        address: str,
        batcher: Batcher,
        ranks: list[WorkerReady],
        within_s: float,
        counts: PullCounts,
    ) -> None:
        """`engine`, `epoch`, `address`: whose they are. `ranks`: in order. `within_s`: what takes longer has failed."""
        self.worth = Worth()
        self._engine, self._epoch, self._address = engine, epoch, address
        self._batcher = batcher
        self._ranks = ranks
        self._within_s = within_s
        self._counts = counts
        self._pulls: dict[str, _Pull] = {}
        self._loans: dict[str, _Loan] = {}
        self._generations: Counter[str] = Counter()
        """By peer: how many of the groups with it have failed."""
        self._shunned: dict[str, float] = {}
        """Peers that are not asked, until when."""
        self._next = 0
        self._sends: list[Send[EngineMessage | WorkerMessage]] = []

    def take_sends(self) -> list[Send[EngineMessage | WorkerMessage]]:
        """All that is to be sent now, in order; each is returned once."""
        sends, self._sends = self._sends, []
        return sends

    # --- pulling ----------------------------------------------------------------------------------------------------

    def pull(self, sequence: Sequence, source: PullSource, now: float) -> None:
        """`source` may have more of the prompt of `sequence`, which stands in line: have it wait for that, if it pays."""
        kv, size = self._batcher.kv, self._batcher.config.block_size
        if kv.tree is None or not sequence.scoring.complete or len(self._pulls) >= _MOST:
            return
        match = kv.match(sequence.key, sequence.request.cache_salt)
        known = kv.known_tokens(match) // size  # in host memory too, from where they are sooner here
        end = min(source.num_blocks, (len(sequence.request.prompt) - 1) // size)
        pull = _Pull(
            name=f"{self._engine}.{self._epoch}.{self._next}",
            sequence=sequence,
            source=source,
            seq=-1,
            key=bytes(sequence.key[: (end * size + 1) * TOKEN_BYTES]),
            first=len(match.blocks),
            end=end,
            began=now,
            patience_s=min(self._within_s, self.worth.patience_s((end - known) * size)),
        )
        count = pull.end - known
        if count < LEAST_BLOCKS or now < self._shunned.get(pull.peer, now) or not self.worth.pays(count * size, now):
            return
        table = self._batcher.open_table(match, sequence.request.cache_salt, pull.end * size)
        if table is None:
            return
        pull.seq, pull.after = table
        self._next += 1
        self._pulls[pull.name] = pull
        self._batcher.set_aside(sequence)
        request = Pull(
            pull=pull.name,
            epoch=source.epoch,
            engine=self._engine,
            reply_to=self._address,
            tokens=pull.key,
            salt=sequence.request.cache_salt,
            first_block=pull.first,
            layout=[rank.layout for rank in self._ranks],
            stores=[rank.store for rank in self._ranks],
            group=self._group(pull),
        )
        self._sends.append(Send(source.address, request))

    def _group(self, pull: _Pull) -> str:
        return f"{pull.peer}>{self._engine}.{self._epoch}.{self._generations[pull.peer]}"

    def _pulled(self, message: Pulled, now: float) -> None:
        pull = self._pulls.get(message.pull)
        if pull is None or pull.answered:
            return
        end = min(message.num_blocks, pull.end)
        if message.refused is not None or end <= pull.first:
            if message.refused == "layout":
                self._shunned[pull.peer] = float("inf")
            self._let_go(pull, message.refused or "gone")
            self._close(pull)
            return
        pull.end, pull.answered = end, True
        if pull.after < 0:
            self._take(pull)

    def _take(self, pull: _Pull) -> None:
        pull.after = -1
        pull.ranks = set(range(len(self._ranks)))
        blocks = self._batcher.kv.table(pull.seq)[pull.first : pull.end]
        for rank in self._ranks:
            take = Take(
                epoch=self._epoch,
                pull=pull.name,
                peer=pull.peer,
                group=self._group(pull),
                store=rank.store,
                blocks=blocks,
                within_s=self._within_s,
            )
            self._sends.append(Send(rank.address, take))

    def _taken(self, pull: _Pull, message: Moved, now: float) -> None:
        pull.ranks.discard(message.rank)
        pull.seconds = max(pull.seconds, message.seconds)
        if message.error and not pull.failed:
            pull.failed = True
            self._shun(pull, now)
            self._let_go(pull, "failed")
        if pull.ranks:
            return
        if pull.failed:
            self._close(pull)
            return
        size = self._batcher.config.block_size
        tokens, waited_s = (pull.end - pull.first) * size, now - pull.began
        self.worth.moved(tokens, pull.seconds, waited_s)
        self._counts.tokens += tokens
        self._counts.seconds += waited_s
        del self._pulls[pull.name]
        self._batcher.close_table(pull.seq, pull.key, pull.end * size)
        self._let_go(pull, "done")

    def _shun(self, pull: _Pull, now: float) -> None:
        self._generations[pull.peer] += 1
        self._shunned[pull.peer] = now + _SHUNNED_S

    def _let_go(self, pull: _Pull, outcome: str) -> None:
        """The request waits for it no longer."""
        if pull.sequence is not None:
            self._counts.ended[outcome] += 1
            self._batcher.bring_back(pull.sequence)
            pull.sequence = None

    def _close(self, pull: _Pull) -> None:
        """No rank writes into its blocks any more."""
        del self._pulls[pull.name]
        self._batcher.close_table(pull.seq)

    # --- giving -----------------------------------------------------------------------------------------------------

    def _lend(self, request: Pull, now: float) -> None:
        kv, batcher = self._batcher.kv, self._batcher
        refusal: PullRefusal | None = None
        if request.layout != [rank.layout for rank in self._ranks] or not all(request.stores):
            refusal = "layout"
        elif len(self._loans) >= _MOST:
            refusal = "busy"
        else:
            match = kv.match(request.tokens, request.salt)
            enough = len(match.blocks) >= request.first_block + LEAST_BLOCKS
            table = batcher.open_table(match, request.salt, match.num_tokens) if enough else None
            if table is not None:
                seq, _ = table
                after = batcher.in_flight[-1].plan.step if batcher.in_flight else -1
                loan = self._loans[request.pull] = _Loan(request, seq, list(match.blocks[request.first_block :]), after, now)
                self._sends.append(Send(request.reply_to, Pulled(request.pull, len(match.blocks))))
                if after < 0:
                    self._give(loan)
                return
            refusal = "gone"
        self._sends.append(Send(request.reply_to, refused(request, refusal)))

    def _give(self, loan: _Loan) -> None:
        request = loan.request
        loan.after = -1
        loan.ranks = set(range(len(self._ranks)))
        for rank, store in zip(self._ranks, request.stores, strict=True):
            give = Give(
                epoch=self._epoch,
                pull=request.pull,
                peer=request.engine,
                group=request.group,
                store=store,
                blocks=loan.blocks,
                within_s=self._within_s,
            )
            self._sends.append(Send(rank.address, give))

    def _given(self, loan: _Loan, message: Moved) -> None:
        loan.ranks.discard(message.rank)
        if not loan.ranks:
            self._counts.loans += 1
            self._batcher.close_table(loan.seq)
            del self._loans[loan.request.pull]

    # --- both -------------------------------------------------------------------------------------------------------

    def receive(self, message: Pull | Pulled | Moved, now: float) -> None:
        """Take in one message of this epoch."""
        match message:
            case Pull():
                self._lend(message, now)
            case Pulled():
                self._pulled(message, now)
            case Moved():
                pull, loan = self._pulls.get(message.pull), self._loans.get(message.pull)
                if pull is not None:
                    self._taken(pull, message, now)
                elif loan is not None:
                    self._given(loan, message)

    def returned(self, step: int) -> None:
        """The result of this step is in: all ranks have read and written what it and the steps before it read and write."""
        for loan in [loan for loan in self._loans.values() if 0 <= loan.after <= step]:
            self._give(loan)
        for pull in [pull for pull in self._pulls.values() if 0 <= pull.after <= step]:
            pull.after = -1
            if pull.answered:
                self._take(pull)

    def tick(self, now: float) -> None:
        """Look at the clock: who has waited long enough? Call a few times a second."""
        for pull in list(self._pulls.values()):
            if now - pull.began > pull.patience_s:
                self._let_go(pull, "late")  # what comes all the same is kept for others
            if now - pull.began > self._within_s and not pull.failed:
                pull.failed = True
                self._shun(pull, now)
                if not pull.ranks:  # there was no answer, so no rank was told
                    self._close(pull)

    def forgive(self, gap: float) -> None:
        """The engine's process stood still for so long."""
        for pull in self._pulls.values():
            pull.began += gap
        for loan in self._loans.values():
            loan.began += gap

    def hung(self, now: float) -> str:
        """Why the epoch has to end: a rank that does not say what became of a transfer. "" if there is none."""
        limit = 4 * self._within_s
        transfers: list[_Pull | _Loan] = [*self._pulls.values(), *self._loans.values()]
        hanging = [transfer.name for transfer in transfers if now - transfer.began > limit]
        return f"no word of the transfer {hanging[0]} for {limit:.0f} s" if hanging else ""


def refused(request: Pull, reason: PullRefusal) -> Pulled:
    """The answer to a Pull that comes to nothing."""
    return Pulled(request.pull, 0, reason)
