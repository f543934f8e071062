"""What the router remembers of the requests it has taken, so that none is lost, doubled or mixed up. No I/O.

    place -> [queued] -- Placement --> [bound] -- tokens ... --> done
                ^                         |
                +--- attempt + 1 ---------+      its engine's epoch is over: what was delivered goes along, as known output

Every delta names its attempt and the index of its first token. Only those of the attempt waited for, from the engine and epoch it
was bound to, at the index the choice has reached, are let through: an engine that was cut off and still talks is not heard.
"""

from dataclasses import dataclass, field

from cluster.actions import Send
from cluster.protocol import (
    Cancel,
    ClusterStatus,
    Deltas,
    EngineDown,
    EngineMessage,
    Place,
    PlaceAgain,
    Placement,
    Refusal,
    Rejected,
    Released,
    Request,
    RouterMessage,
    SchedulerMessage,
    Submit,
    TokenDelta,
    Withdraw,
)
from router.generation import ChoiceDelta, Generation, Overloaded, TimedOut, TooLarge, Unavailable


@dataclass(frozen=True)
class News:
    """Of one generation, for its reader: deltas, or its end by an error."""

    id: str
    deltas: list[ChoiceDelta]
    error: Exception | None = None


@dataclass(frozen=True)
class JournalConfig:
    """Settings of the journal."""

    address: str
    """Of the router's mailbox."""
    scheduler: str
    """Address of the global scheduler, as far as known at the start."""
    max_strikes: int = 6
    """A request that was running each time when so many engines failed may be what makes them fail."""
    missing_s: float = 15.0
    """An engine that the scheduler has not named for so long is gone."""


@dataclass
class _Entry:
    generation: Generation
    arrival: float
    """Unix time, comparable between routers."""
    deadline: float
    attempt: int = 0
    placement: Placement | None = None
    taken: bool = False
    """Its reader knows that an engine took it."""
    begun: bool = False
    """Its reader has had news of tokens."""
    strikes: int = 0
    emitted: list[list[int]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    names: bytes = b""
    """Of the prompt's blocks."""
    scored: int = 1
    """Prompt positions whose log-probabilities the reader has, the first included, which has none."""

    @property
    def id(self) -> str:
        return self.generation.id

    @property
    def waited_s(self) -> float:
        return 0.0 if self.placement is None else self.placement.waited_s

    @property
    def done(self) -> bool:
        return all(self.finished)

    def fits(self, delta: TokenDelta) -> bool:
        """Whether nothing is missing between what the reader has and `delta`."""
        if delta.prompt_logprobs and delta.prompt_index > self.scored:
            return False
        if self.finished[delta.choice]:
            return True
        scored = max(self.scored, delta.prompt_index + len(delta.prompt_logprobs))
        generation = self.generation
        complete = generation.params.prompt_logprobs is None or scored >= len(generation.prompt)
        return delta.index <= len(self.emitted[delta.choice]) and (complete or not (delta.tokens or delta.finish))

    def take(self, delta: TokenDelta) -> ChoiceDelta | None:
        """What is new in a `delta` that fits; None if the reader has it all."""
        choice = delta.choice
        scores = delta.prompt_logprobs[self.scored - delta.prompt_index :]
        over = self.finished[choice]
        known = len(self.emitted[choice]) - delta.index
        tokens, logprobs, finish = ([], [], None) if over else (delta.tokens[known:], delta.logprobs[known:], delta.finish)
        if not tokens and not scores and finish is None:
            return None
        queued_s = None if self.begun or delta.queued_s is None else self.waited_s + delta.queued_s
        cached = None if self.begun else delta.cached_tokens
        self.begun = True
        self.scored += len(scores)
        self.emitted[choice].extend(tokens)
        self.finished[choice] = over or finish is not None
        return ChoiceDelta(choice, tokens, logprobs, finish, queued_s, scores, cached, delta.verified)

    def bound_to(self, engine: str, epoch: int) -> bool:
        return self.placement is not None and (self.placement.engine, self.placement.epoch) == (engine, epoch)


class Journal:
    """The router's logic. Feed it with begin(), cancel(), finish_choice(), receive() and tick()."""

    def __init__(self, config: JournalConfig) -> None:
        self.config = config
        self.status: ClusterStatus | None = None
        self._scheduler = config.scheduler
        self._entries: dict[str, _Entry] = {}
        self._missing: dict[str, float] = {}
        """Engines that requests are bound to and the scheduler does not name: since when."""
        self._messages: list[Send[SchedulerMessage | EngineMessage]] = []
        self._news: list[News] = []

    def take_messages(self) -> list[Send[SchedulerMessage | EngineMessage]]:
        """All that is to be sent now, in order; each is returned once."""
        messages, self._messages = self._messages, []
        return messages

    def take_news(self) -> list[News]:
        """All that readers are to be told now, in order; each is returned once."""
        news, self._news = self._news, []
        return news

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        """Whether more is to come of this generation."""
        return id in self._entries

    # --- from the clients -------------------------------------------------------------------------------------------

    def begin(self, generation: Generation, arrival: float, now: float, names: bytes = b"") -> None:
        """Take a generation. `arrival` is unix time, `now` the clock that tick() is given. `names`: of the prompt's blocks, where
        the scheduler places requests by their prefixes (see Place)."""
        n = generation.params.n
        entry = _Entry(generation, arrival, now + generation.timeout_s, names=names)
        entry.emitted, entry.finished = [[] for _ in range(n)], [False] * n
        self._entries[generation.id] = entry
        self._place(entry, now)

    def cancel(self, id: str) -> None:
        """Nobody waits for this generation any more. Unknown and ended ones are no error."""
        entry = self._entries.pop(id, None)
        if entry is not None:
            self._call_off(entry, [c for c, finished in enumerate(entry.finished) if not finished])

    def finish_choice(self, id: str, choice: int) -> None:
        """This choice has all the tokens it needs. Its end is not news to the reader, who asked for it."""
        entry = self._entries.get(id)
        if entry is None or entry.finished[choice]:
            return
        entry.finished[choice] = True
        if entry.done:
            del self._entries[id]
        if entry.done or entry.placement is not None:
            self._call_off(entry, [choice])

    # --- from the cluster -------------------------------------------------------------------------------------------

    def scheduler_at(self, address: str) -> None:
        """Where the scheduler is to be reached. It will greet with PlaceAgain, as it does everybody it does not know."""
        self._scheduler = address

    def receive(self, message: RouterMessage, now: float) -> None:
        """Take in one message; what does not belong to the attempt waited for changes nothing."""
        match message:
            case Deltas():
                self._deltas(message, now)
            case Placement():
                self._bound(message, now)
            case Refusal():
                self._refused(message)
            case Rejected():
                entry = self._entry(message.request, message.attempt)
                if entry is not None and entry.placement is not None:
                    self._fail(entry, TooLarge(message.reason))
            case Released():
                for request, attempt in message.requests:
                    entry = self._entry(request, attempt)
                    if entry is not None and entry.bound_to(message.engine, message.epoch):
                        self._again(entry, message.reason, now, strike=request in message.suspects)
            case EngineDown():
                self._engine_down(message, now)
            case PlaceAgain():
                for entry in [e for e in self._entries.values() if e.placement is None]:
                    self._place(entry, now)
            case ClusterStatus():
                self._cluster_status(message, now)

    def tick(self, now: float) -> None:
        """Look at the clock: end what nobody should wait for any longer. Call a few times a second."""
        for entry in [e for e in self._entries.values() if now >= e.deadline]:
            self._call_off(entry, [c for c, finished in enumerate(entry.finished) if not finished])
            self._fail(entry, TimedOut(f"no answer within {entry.generation.timeout_s:g} s"))

    def _deltas(self, message: Deltas, now: float) -> None:
        by_id: dict[str, list[ChoiceDelta]] = {}
        lost: dict[str, _Entry] = {}
        for delta in message.deltas:
            entry = self._entry(delta.request, delta.attempt)
            if entry is None or not entry.bound_to(message.engine, message.epoch):
                continue
            if not entry.fits(delta):
                lost[entry.id] = entry
                continue
            fresh = entry.take(delta)
            if fresh is not None:
                by_id.setdefault(entry.id, []).append(fresh)
        for id, deltas in by_id.items():
            self._news.append(News(id, deltas))
            if self._entries[id].done:
                del self._entries[id]
        for entry in lost.values():
            self._call_off(entry, [c for c, finished in enumerate(entry.finished) if not finished])
            self._again(entry, "a message of the engine was lost", now, strike=False)

    def _bound(self, placement: Placement, now: float) -> None:
        entry = self._entry(placement.request, placement.attempt)
        if entry is None or entry.placement is not None:
            self._to_scheduler(Withdraw(placement.request, placement.attempt))
            return
        entry.placement = placement
        if not entry.taken:
            entry.taken = True
            self._news.append(News(entry.id, []))
        request = Request(
            id=entry.id,
            attempt=entry.attempt,
            reply_to=self.config.address,
            prompt=entry.generation.prompt,
            emitted=[list(tokens) for tokens in entry.emitted],
            finished=list(entry.finished),
            params=entry.generation.params,
            deadline_s=max(0.0, entry.deadline - now),
            cache_salt=entry.generation.cache_salt,
            scored=entry.scored,
        )
        self._messages.append(Send(placement.address, Submit(placement.epoch, request, placement.source)))

    def _refused(self, refusal: Refusal) -> None:
        entry = self._entry(refusal.request, refusal.attempt)
        if entry is None or entry.placement is not None:
            return
        errors = {
            "queue_full": Overloaded(refusal.retry_after_s),
            "too_large": TooLarge("prompt and max_tokens are more than the KV pool of any engine holds"),
            "deadline": TimedOut("no engine had room in time"),
        }
        self._fail(entry, errors[refusal.reason])

    def _engine_down(self, message: EngineDown, now: float) -> None:
        for entry in list(self._entries.values()):
            placement = entry.placement
            if placement is not None and placement.engine == message.engine and placement.epoch <= message.epoch:
                self._again(entry, "the engine died", now, strike=True)

    def _cluster_status(self, status: ClusterStatus, now: float) -> None:
        """An EngineDown may have been missed (the scheduler was down itself): the status says as much, a little later."""
        self.status = status
        epochs = {engine.engine: engine.epoch for engine in status.engines}
        bound = dict.fromkeys((p.engine, p.epoch) for e in self._entries.values() if (p := e.placement) is not None)
        self._missing = {engine: self._missing.get(engine, now) for engine, _ in bound if engine not in epochs}
        for engine, epoch in bound:
            if epochs.get(engine, epoch) > epoch or now - self._missing.get(engine, now) > self.config.missing_s:
                self._engine_down(EngineDown(engine, epoch), now)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _entry(self, id: str, attempt: int) -> _Entry | None:
        entry = self._entries.get(id)
        return entry if entry is not None and entry.attempt == attempt else None

    def _place(self, entry: _Entry, now: float) -> None:
        params, prompt = entry.generation.params, len(entry.generation.prompt)
        choices = [len(tokens) for tokens, finished in zip(entry.emitted, entry.finished, strict=True) if not finished]
        place = Place(
            request=entry.id,
            attempt=entry.attempt,
            reply_to=self.config.address,
            num_tokens=prompt + sum(choices),
            longest=prompt + params.max_tokens,
            sequences=params.beam_width or len(choices),
            arrival=entry.arrival,
            deadline_s=max(0.0, entry.deadline - now),
            names=entry.names,
        )
        self._to_scheduler(place)

    def _again(self, entry: _Entry, reason: str, now: float, strike: bool) -> None:
        """The next attempt, with everything delivered so far. `strike`: the request itself may be why the last one failed."""
        entry.placement = None
        entry.attempt += 1
        entry.strikes += strike
        if entry.strikes >= self.config.max_strikes:
            self._fail(entry, Unavailable(f"given up after {entry.attempt} attempts; the last ended: {reason}"))
        else:
            self._place(entry, now)

    def _call_off(self, entry: _Entry, choices: list[int]) -> None:
        if entry.placement is None:
            self._to_scheduler(Withdraw(entry.id, entry.attempt))
        else:
            cancel = Cancel(request=entry.id, attempt=entry.attempt, choices=choices)
            self._messages.append(Send(entry.placement.address, cancel))

    def _fail(self, entry: _Entry, error: Exception) -> None:
        del self._entries[entry.id]
        self._news.append(News(entry.id, [], error))

    def _to_scheduler(self, message: SchedulerMessage) -> None:
        self._messages.append(Send(self._scheduler, message))
