"""KV that an engine pulls from others, and that it gives to them. No I/O: part of the engine's state machine for one epoch.

A request whose prompt another engine has more of waits as *fetching*, outside of all plans, while the blocks come. Then they are
put into the radix tree, the request joins the waiting line at its place, and finds them there as it would find any other prefix.
Whatever goes wrong on the way: it joins the line without them, and they are computed again.

Blocks that a transfer writes or reads belong to a table of their own. The table of a pull holds the blocks before those that are to
come, so that they are not evicted meanwhile; that of a loan is the source's lease. Both are kept until every rank has said that it
touches them no more, however long ago the request has stopped waiting.

A rank begins when it has run all plans that were launched before: they may still write what is to be given, or read what was in the
blocks before (a copy, a store to host memory). It fails what has not begun or not gone on within a bounded time.
"""

import secrets
from collections import Counter
from dataclasses import dataclass, field

from cluster.actions import Send
from cluster.batcher import Batcher
from cluster.protocol import EngineMessage, Give, Moved, Pull, Pulled, PullRefusal, PullSource, Take, WorkerMessage, WorkerReady
from cluster.request import Sequence
from cluster.worth import Worth
from kv.children import common_bytes
from kv.names import TOKEN_BYTES

LEAST_BLOCKS = 4
"""Fewer are not worth the messages."""
_MOST = 8
"""Pulls at a time, and loans."""
_SHUNNED_S = 30.0
"""An engine from which nothing came is not asked again for so long."""
_LEAST_HUNG_S = 20.0


@dataclass
class PullCounts:
    """Running totals of an engine's process."""

    ended: Counter[str] = field(default_factory=Counter)
    """Pulls by what became of them for who waited: done, gone, layout, busy, failed, late."""
    tokens: int = 0
    """Whose KV has come, late or not."""
    seconds: float = 0.0
    """That this took, from asking to having it."""
    loans: int = 0


@dataclass
class _Pull:
    name: str
    waiting: list[Sequence]
    source: PullSource
    seq: int
    """Of the table."""
    key: bytes
    """The packed tokens of all blocks wanted, and one more."""
    salt: str
    first: int
    """Blocks that were here already."""
    end: int
    began: float
    patience_s: float
    """Nobody waits longer."""
    ranks: set[int] = field(default_factory=set)
    """Of which word is awaited."""
    told_at: float = 0.0
    """When they were told."""
    seconds: float = 0.0
    failed: bool = False

    @property
    def peer(self) -> str:
        return f"{self.source.engine}.{self.source.epoch}"


@dataclass
class _Loan:
    name: str
    seq: int
    told_at: float
    ranks: set[int]


class Pulls:
    """Feed it with pull(), receive() and tick(); send what take_sends() returns."""

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
        self._me = f"{engine}.{epoch}"
        self._epoch, self._address = epoch, address
        self._batcher = batcher
        self._ranks = ranks
        self._within_s = within_s
        self._counts = counts
        self._pulls: dict[str, _Pull] = {}
        self._loans: dict[str, _Loan] = {}
        self._shunned: dict[str, float] = {}
        """Peers that are not asked, until when."""
        self._secret = secrets.token_hex(8)
        self._next = 0
        self._sends: list[Send[EngineMessage | WorkerMessage]] = []

    def take_sends(self) -> list[Send[EngineMessage | WorkerMessage]]:
        """All that is to be sent now, in order; each is returned once."""
        sends, self._sends = self._sends, []
        return sends

    # --- pulling ----------------------------------------------------------------------------------------------------

    def pull(self, sequence: Sequence, source: PullSource | None, now: float) -> None:
        """`sequence` stands in line. Have it wait for KV that is on its way here already, or that `source` may have, if that
        pays."""
        kv, size, salt = self._batcher.kv, self._batcher.config.block_size, sequence.request.cache_salt
        if kv.tree is None or not sequence.scoring.complete or (source is None and not self._pulls):
            return
        match = kv.match(sequence.key, salt)
        known = kv.known_tokens(match) // size  # in host memory too, from where they are sooner here
        if self._join(sequence, known) or source is None or len(self._pulls) >= _MOST:
            return
        peer, first = f"{source.engine}.{source.epoch}", len(match.blocks)
        end = min(source.num_blocks, (len(sequence.request.prompt) - 1) // size)
        tokens = (end - known) * size
        if end - known < LEAST_BLOCKS or now < self._shunned.get(peer, now) or not self.worth.pays(tokens, now):
            return
        seq = self._batcher.open_table(match, salt, end * size)
        if seq is None:
            return
        self.worth.tried(now)
        name, self._next = f"{self._me}.{self._secret}.{self._next}", self._next + 1
        key = bytes(sequence.key[: (end * size + 1) * TOKEN_BYTES])
        patience_s = min(self._within_s, self.worth.patience_s(tokens))
        self._pulls[name] = _Pull(name, [sequence], source, seq, key, salt, first, end, now, patience_s)
        self._batcher.set_aside(sequence, end * size)
        request = Pull(
            pull=name,
            epoch=source.epoch,
            peer=self._me,
            reply_to=self._address,
            tokens=key,
            salt=salt,
            first_block=first,
            layout=[rank.layout for rank in self._ranks],
            stores=[rank.store for rank in self._ranks],
        )
        self._sends.append(Send(source.address, request))

    def _join(self, sequence: Sequence, known: int) -> bool:
        """Wait for a pull that others wait for, if it brings enough of this prompt too."""
        size = self._batcher.config.block_size
        for pull in self._pulls.values():
            if pull.waiting and pull.salt == sequence.request.cache_salt:
                blocks = min(pull.end, common_bytes(pull.key, bytes(sequence.key[: len(pull.key)])) // (size * TOKEN_BYTES))
                if blocks - known >= LEAST_BLOCKS:
                    pull.waiting.append(sequence)
                    self._batcher.set_aside(sequence, blocks * size)
                    return True
        return False

    def _pulled(self, message: Pulled, now: float) -> None:
        pull = self._pulls.get(message.pull)
        if pull is None or pull.ranks:
            return
        end = min(message.num_blocks, pull.end)
        if message.refused is not None or end <= pull.first:
            if message.refused == "layout":
                self._shunned[pull.peer] = float("inf")
            self._let_go(pull, message.refused or "gone")
            self._close(pull)
            return
        pull.end, pull.told_at = end, now
        pull.ranks = set(range(len(self._ranks)))
        blocks = self._batcher.kv.table(pull.seq)[pull.first : end]
        for rank in self._ranks:
            take = Take(
                epoch=self._epoch,
                pull=pull.name,
                peer=pull.peer,
                store=rank.store,
                blocks=blocks,
                after=self._batcher.last_step,
                within_s=self._within_s,
            )
            self._sends.append(Send(rank.address, take))

    def _taken(self, pull: _Pull, message: Moved, now: float) -> None:
        pull.ranks.discard(message.rank)
        pull.seconds = max(pull.seconds, message.seconds)
        if message.error and not pull.failed:
            pull.failed = True
            self._shunned[pull.peer] = now + _SHUNNED_S
            self._let_go(pull, "failed")
        if pull.ranks:
            return
        if pull.failed:
            self._close(pull)
            return
        size = self._batcher.config.block_size
        tokens, took_s = (pull.end - pull.first) * size, now - pull.began
        self.worth.moved(tokens, pull.seconds, took_s)
        self._counts.tokens += tokens
        self._counts.seconds += took_s
        self._close(pull, pull.end * size)
        self._let_go(pull, "done")

    def _let_go(self, pull: _Pull, outcome: str) -> None:
        """Nobody waits for it any longer."""
        self._counts.ended[outcome] += bool(pull.waiting)
        for sequence in pull.waiting:
            self._batcher.bring_back(sequence)
        pull.waiting = []

    def _close(self, pull: _Pull, num_tokens: int = 0) -> None:
        """No rank writes into its blocks any more. The KV of the first `num_tokens` can be found from now on."""
        del self._pulls[pull.name]
        self._batcher.close_table(pull.seq, pull.key, num_tokens)

    # --- giving -----------------------------------------------------------------------------------------------------

    def _lend(self, request: Pull, now: float) -> None:
        refusal, kv = self._why_not(request), self._batcher.kv
        match = kv.match(request.tokens, request.salt)
        seq = None
        if refusal is None and len(match.blocks) >= request.first_block + LEAST_BLOCKS:
            seq = self._batcher.open_table(match, request.salt, match.num_tokens)
        if seq is None:
            self._sends.append(Send(request.reply_to, refused(request, refusal or "gone")))
            return
        self._loans[request.pull] = _Loan(request.pull, seq, now, set(range(len(self._ranks))))
        self._sends.append(Send(request.reply_to, Pulled(request.pull, len(match.blocks))))
        for rank, store in zip(self._ranks, request.stores, strict=True):
            give = Give(
                epoch=self._epoch,
                pull=request.pull,
                peer=request.peer,
                store=store,
                blocks=list(match.blocks[request.first_block :]),
                after=self._batcher.last_step,
                within_s=self._within_s,
            )
            self._sends.append(Send(rank.address, give))

    def _why_not(self, request: Pull) -> PullRefusal | None:
        if request.layout != [rank.layout for rank in self._ranks] or not all(request.stores):
            return "layout"
        return "busy" if len(self._loans) >= _MOST or request.pull in self._loans else None

    def _given(self, loan: _Loan, message: Moved) -> None:
        loan.ranks.discard(message.rank)
        if not loan.ranks:
            self._counts.loans += 1
            self._batcher.close_table(loan.seq)
            del self._loans[loan.name]

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

    def tick(self, now: float) -> None:
        """Look at the clock: who has waited long enough? Call a few times a second."""
        for pull in list(self._pulls.values()):
            if now - pull.began > pull.patience_s:
                self._let_go(pull, "late")  # what comes all the same is kept for others
            if now - pull.began > self._within_s and not pull.ranks:  # there was no answer, so no rank was told
                self._shunned[pull.peer] = now + _SHUNNED_S
                self._let_go(pull, "late")
                self._close(pull)
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}

    def forgive(self, gap: float) -> None:
        """The engine's process stood still for so long."""
        for pull in self._pulls.values():
            pull.began += gap
            pull.told_at += gap
        for loan in self._loans.values():
            loan.told_at += gap

    def hung(self, now: float) -> str:
        """Why the epoch has to end: a rank that does not say what became of a transfer. "" if there is none."""
        limit = max(_LEAST_HUNG_S, 4 * self._within_s)  # a rank says so after twice the time
        told: list[_Pull | _Loan] = [*(pull for pull in self._pulls.values() if pull.ranks), *self._loans.values()]
        hanging = [transfer.name for transfer in told if now - transfer.told_at > limit]
        return f"no word of the transfer {hanging[0]} for {limit:.0f} s" if hanging else ""


def refused(request: Pull, reason: PullRefusal) -> Pulled:
    """The answer to a Pull that comes to nothing."""
    return Pulled(request.pull, 0, reason)
