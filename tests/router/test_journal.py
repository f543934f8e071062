"""The journal: whose words it lets through, and what it does when somebody dies."""

from typing import TypeVar

import pytest

from cluster.protocol import (
    Cancel,
    Deltas,
    EngineDown,
    Place,
    PlaceAgain,
    Placement,
    Refusal,
    Rejected,
    Released,
    RouterMessage,
    SamplingParams,
    Submit,
    TokenDelta,
    TokenLogprobs,
    Withdraw,
)
from router.generation import Generation, Overloaded, TimedOut, TooLarge, Unavailable
from router.journal import Journal, JournalConfig
from tests.cluster.messages import status

M = TypeVar("M")


class Bench:
    def __init__(self, n: int = 1, prompt_logprobs: int | None = None) -> None:
        self.journal = Journal(JournalConfig("router", "s!", max_strikes=3))
        params = SamplingParams(seed=1, max_tokens=8, n=n, prompt_logprobs=prompt_logprobs)
        self.journal.begin(
            Generation("r", [1, 2, 3, 4, 5] if prompt_logprobs == 0 else [1, 2, 3], params, timeout_s=60.0), arrival=5.0, now=0.0
        )

    def hear(self, *messages: RouterMessage, now: float = 1.0) -> None:
        for message in messages:
            self.journal.receive(message, now)

    def bind(self, attempt: int = 0, engine: str = "e", epoch: int = 1) -> None:
        self.hear(Placement("r", attempt, engine, epoch, f"{engine}!", 0.0))

    def sent(self, kind: type[M]) -> list[tuple[str, M]]:
        return [(s.address, s.message) for s in self.journal.take_messages() if isinstance(s.message, kind)]

    def tokens(self, choice: int = 0) -> list[int]:
        return [t for news in self.journal.take_news() for d in news.deltas if d.choice == choice for t in d.tokens]

    def error(self) -> Exception | None:
        errors = [news.error for news in self.journal.take_news() if news.error is not None]
        return errors[0] if errors else None


def delta(attempt: int, index: int, *tokens: int, choice: int = 0, end: bool = False) -> TokenDelta:
    return TokenDelta(
        request="r", attempt=attempt, choice=choice, index=index, tokens=list(tokens), finish="length" if end else None
    )


@pytest.fixture
def bound() -> Bench:
    bench = Bench()
    bench.bind()
    return bench


def test_place_says_the_size() -> None:
    ((address, place),) = Bench(n=2).sent(Place)
    assert address == "s!"
    assert (place.num_tokens, place.longest, place.sequences, place.arrival, place.deadline_s) == (3, 11, 2, 5.0, 60.0)


def test_bound_means_submitted(bound: Bench) -> None:
    ((address, submit),) = bound.sent(Submit)
    assert (address, submit.epoch, submit.request.attempt, submit.request.deadline_s) == ("e!", 1, 0, 59.0)


@pytest.mark.parametrize(
    ("engine", "epoch", "attempt"), [("f", 1, 0), ("e", 0, 0), ("e", 2, 0), ("e", 1, 1)], ids=["engine", "old", "new", "attempt"]
)
def test_only_the_one_bound_to_is_heard(bound: Bench, engine: str, epoch: int, attempt: int) -> None:
    bound.hear(Deltas(engine, epoch, [delta(attempt, 0, 9)]))
    assert bound.tokens() == []
    bound.hear(Deltas("e", 1, [delta(0, 0, 1, 2), delta(7, 2, 3)]))
    assert bound.tokens() == [1, 2]


def test_the_next_attempt_takes_what_was_delivered_along(bound: Bench) -> None:
    bound.hear(Deltas("e", 1, [delta(0, 0, 1, 2)]), EngineDown("e", 1))
    place = bound.sent(Place)[-1][1]
    assert (place.attempt, place.num_tokens) == (1, 5)
    bound.bind(attempt=1, engine="f", epoch=7)
    request = bound.sent(Submit)[-1][1].request
    assert (request.attempt, request.emitted, request.finished) == (1, [[1, 2]], [False])
    bound.tokens()
    bound.hear(Deltas("e", 1, [delta(0, 2, 8)]), Deltas("f", 7, [delta(0, 2, 8), delta(1, 2, 3, end=True)]))
    assert bound.tokens() == [3]
    assert len(bound.journal) == 0


def test_what_was_verified_is_told_by_each_attempt(bound: Bench) -> None:
    told = [delta(0, 0, 1, 2), delta(1, 2, 3, 4, 5), delta(1, 5, 6, end=True)]
    for news, verified in zip(told, ((4, 1), (3, 2), (0, 0)), strict=True):
        news.verified = verified
    bound.hear(Deltas("e", 1, told[:1]), EngineDown("e", 1))
    bound.bind(attempt=1, engine="f", epoch=7)
    bound.hear(Deltas("e", 1, told[:1]), Deltas("f", 7, told[1:]))
    heard = [each.verified for news in bound.journal.take_news() for each in news.deltas]
    assert heard == [(4, 1), (3, 2), (0, 0)], "what a dead engine says again is not counted"


def test_an_overlap_is_delivered_once(bound: Bench) -> None:
    bound.hear(Deltas("e", 1, [delta(0, 0, 1, 2)]), Deltas("e", 1, [delta(0, 1, 2, 3)]), Deltas("e", 1, [delta(0, 0, 1, 2, 3)]))
    assert bound.tokens() == [1, 2, 3]
    bound.hear(Deltas("e", 1, [delta(0, 2, 3, end=True)]))
    assert [d.finish for news in bound.journal.take_news() for d in news.deltas] == ["length"], "the end is news, its token is not"


def test_a_gap_means_another_attempt(bound: Bench) -> None:
    bound.hear(Deltas("e", 1, [delta(0, 0, 1), delta(0, 2, 3)]))
    assert bound.tokens() == [1]
    messages = [s.message for s in bound.journal.take_messages()]
    assert Cancel(request="r", attempt=0, choices=[0]) in messages
    assert [m.attempt for m in messages if isinstance(m, Place)] == [0, 1]


def test_finished_choices_are_not_run_again() -> None:
    bench = Bench(n=3)
    bench.bind()
    bench.hear(Deltas("e", 1, [delta(0, 0, 1, choice=0, end=True), delta(0, 0, 1, choice=1)]))
    bench.journal.finish_choice("r", 2)
    assert bench.sent(Cancel)[-1][1].choices == [2]
    bench.hear(Released("e", 1, [("r", 0)], "died"))
    place = bench.sent(Place)[-1][1]
    assert (place.sequences, place.num_tokens) == (1, 4)
    bench.bind(attempt=1)
    assert bench.sent(Submit)[-1][1].request.finished == [True, False, True]
    bench.journal.finish_choice("r", 1)
    assert len(bench.journal) == 0


@pytest.mark.parametrize("end", ["cancel", "attempt", "twice"])
def test_a_placement_that_comes_too_late_is_given_back(end: str) -> None:
    bench = Bench()
    if end == "cancel":
        bench.journal.cancel("r")
        assert bench.sent(Withdraw) == [("s!", Withdraw("r", 0))]
    else:
        bench.bind()
    if end == "attempt":
        bench.hear(EngineDown("e", 1))
    bench.journal.take_messages()
    bench.bind()
    assert bench.sent(Withdraw) == [("s!", Withdraw("r", 0))]


def test_releases_and_deaths_of_others_change_nothing(bound: Bench) -> None:
    bound.sent(Place)
    bound.hear(Released("e", 0, [("r", 0)], ""), Released("f", 1, [("r", 0)], ""), Released("e", 1, [("r", 1)], ""))
    bound.hear(EngineDown("e", 0), EngineDown("f", 9))
    assert bound.sent(Place) == []


def test_a_death_heard_twice_costs_one_attempt(bound: Bench) -> None:
    bound.hear(Released("e", 1, [("r", 0)], "died"), EngineDown("e", 1), Released("e", 1, [("r", 0)], "died"))
    assert [p.attempt for _, p in bound.sent(Place)] == [0, 1]


def test_given_up_after_too_many_deaths(bound: Bench) -> None:
    for attempt in range(3):
        bound.hear(EngineDown("e", attempt + 1))
        bound.bind(attempt + 1, epoch=attempt + 2)
    assert isinstance(bound.error(), Unavailable)
    assert len(bound.journal) == 0


def test_refusals_and_time_outs() -> None:
    cases: list[tuple[RouterMessage, type[Exception]]] = [
        (Refusal("r", 0, "queue_full", 2.0), Overloaded),
        (Refusal("r", 0, "too_large"), TooLarge),
        (Refusal("r", 0, "deadline"), TimedOut),
    ]
    for message, kind in cases:
        bench = Bench()
        bench.hear(message)
        assert isinstance(bench.error(), kind)
    bench = Bench()
    bench.bind()
    bench.hear(Refusal("r", 0, "deadline"))
    assert bench.error() is None
    bench.hear(Rejected("r", 0, "too long"))
    assert isinstance(bench.error(), TooLarge)


def test_a_deadline_ends_it_everywhere(bound: Bench) -> None:
    bound.journal.tick(59.9)
    assert bound.error() is None
    bound.journal.tick(60.0)
    assert isinstance(bound.error(), TimedOut)
    assert bound.sent(Cancel) == [("e!", Cancel(request="r", attempt=0, choices=[0]))]


def test_a_new_scheduler_is_told_what_waits() -> None:
    bench = Bench()
    bench.hear(status(), status())
    assert len(bench.sent(Place)) == 1
    bench.hear(PlaceAgain())
    assert [p.attempt for _, p in bench.sent(Place)] == [0]
    bench.bind()
    bench.hear(PlaceAgain())
    assert bench.sent(Place) == [], "its engine runs on without the scheduler"


def test_a_status_with_a_later_epoch_tells_of_the_death(bound: Bench) -> None:
    """Its EngineDown went out while no scheduler knew of this router."""
    bound.sent(Place)
    bound.hear(status(e=1), status(e=0))
    assert bound.sent(Place) == []
    bound.hear(status(e=2))
    assert [p.attempt for _, p in bound.sent(Place)] == [1]


def test_an_engine_that_the_scheduler_no_longer_names_is_gone_after_a_while(bound: Bench) -> None:
    bound.sent(Place)
    bound.journal.receive(status(), 1.0)
    bound.journal.receive(status(), 15.0)
    assert bound.sent(Place) == []
    bound.journal.receive(status(), 16.5)
    assert [p.attempt for _, p in bound.sent(Place)] == [1]


def scored(attempt: int, *positions: int, choice: int = 0, tokens: tuple[int, ...] = ()) -> TokenDelta:
    """Prompt log-probabilities that tell their position, and perhaps first tokens."""
    told = [TokenLogprobs(-float(position), [], []) for position in positions]
    first = positions[0] if positions else 0
    return TokenDelta(
        request="r", attempt=attempt, choice=choice, index=0, tokens=list(tokens), prompt_index=first, prompt_logprobs=told
    )


def positions(bench: Bench) -> list[int]:
    return [-int(e.logprob) for news in bench.journal.take_news() for d in news.deltas for e in d.prompt_logprobs]


def test_each_prompt_position_is_delivered_once_over_attempts() -> None:
    bench = Bench(prompt_logprobs=0)
    bench.bind()
    assert bench.sent(Submit)[-1][1].request.scored == 1
    bench.hear(Deltas("e", 1, [scored(0, 1, 2)]), EngineDown("e", 1))
    bench.bind(attempt=1, engine="f", epoch=7)
    assert bench.sent(Submit)[-1][1].request.scored == 3
    bench.hear(Deltas("e", 1, [scored(0, 3, 4)]), Deltas("f", 7, [scored(1, 2, 3), scored(1, 1, 2)]))
    assert positions(bench) == [1, 2, 3]
    bench.hear(Deltas("f", 7, [scored(1, 3, 4, tokens=(9,))]))
    (news,) = bench.journal.take_news()
    assert [(d.tokens, [e.logprob for e in d.prompt_logprobs]) for d in news.deltas] == [([9], [-4.0])]


@pytest.mark.parametrize("gap", [scored(0, 2, 3), scored(0, 1, 2, tokens=(9,)), delta(0, 0, 9), delta(0, 0, end=True)])
def test_a_gap_in_the_prompt_means_another_attempt(gap: TokenDelta) -> None:
    bench = Bench(prompt_logprobs=0)
    bench.bind()
    bench.hear(Deltas("e", 1, [gap]))
    assert [p.attempt for _, p in bench.sent(Place)] == [0, 1]
    assert bench.journal.take_news()[-1].deltas == []


def test_a_finished_choice_can_still_tell_of_the_prompt() -> None:
    bench = Bench(n=2, prompt_logprobs=0)
    bench.bind()
    bench.journal.finish_choice("r", 0)
    bench.hear(Deltas("e", 1, [scored(0, 1, 2, 3, 4, tokens=(9,))]))
    (delta,) = [d for news in bench.journal.take_news() for d in news.deltas]
    assert (delta.tokens, len(delta.prompt_logprobs)) == ([], 4)
    bench.hear(EngineDown("e", 1))
    bench.bind(attempt=1, epoch=2)
    assert bench.sent(Submit)[-1][1].request.finished == [True, False]
