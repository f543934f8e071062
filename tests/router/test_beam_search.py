"""use_beam_search: what is asked of the engines, what comes back, and what does not go with it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.protocol import Deltas, Place, Placement, Rejected, Released, SamplingParams, Submit, TokenDelta
from router.client import Client, RaylineError
from router.generation import ChoiceDelta, Generation
from router.journal import Journal, JournalConfig
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Step
from tests.router.grpc_server import PATIENCE_S, GrpcApi

ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
]


def script(generation: Generation) -> Iterator[Step]:
    """Choice c is 70 + c, twice; all in one step, as engines tell of beams."""
    yield []
    yield [ChoiceDelta(c, [70 + c] * 2, [], "length") for c in range(generation.params.n)]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_best_of_is_the_width(tokenizer: Tokenizer, served: ServedModel, path: str, body: dict[str, Any]) -> None:
    api = Api(tokenizer, served, script)
    options = {"length_penalty": 0.5, "early_stopping": True, "temperature": 0, "seed": 3, "top_k": -1}
    answer = api.post(path, **body, use_beam_search=True, n=2, best_of=4, max_tokens=2, return_token_ids=True, **options)
    assert [choice["token_ids"] for choice in answer["choices"]] == [[70, 70], [71, 71]]
    assert answer["usage"]["completion_tokens"] == 4
    params = api.generator.generations[0].params
    assert (params.n, params.beam_width, params.length_penalty, params.early_stopping) == (2, 4, 0.5, True)
    assert params.logprobs is None, "nothing is ranked here"


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_the_width_is_n_otherwise(tokenizer: Tokenizer, served: ServedModel, path: str, body: dict[str, Any]) -> None:
    api = Api(tokenizer, served, script)
    api.post(path, **body, use_beam_search=True, n=3, stop_token_ids=[5], ignore_eos=True, cache_salt="s")
    api.post(path, **body, n=3)
    api.post(path, **body, use_beam_search=False, length_penalty=1.0, early_stopping=False)
    assert [(g.params.n, g.params.beam_width) for g in api.generator.generations] == [(3, 3), (3, 0), (1, 0)]
    assert api.generator.generations[0].params.stop_token_ids == (5,)


def test_a_stream_gets_all_at_the_end(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, script)
    events = api.events("/v1/completions", prompt="x", use_beam_search=True, n=2, best_of=3, max_tokens=2, return_token_ids=True)
    told = {choice["index"]: choice["token_ids"] for event in events for choice in event["choices"] if choice["token_ids"]}
    assert told == {0: [70, 70], 1: [71, 71]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"stop": "a"}, "stop", "invalid_value"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "invalid_value"),
    ({"top_k": 5}, "top_k", "invalid_value"),
    ({"top_p": 0.5}, "top_p", "invalid_value"),
    ({"min_p": 0.5}, "min_p", "invalid_value"),
    ({"temperature": 0.7}, "temperature", "invalid_value"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "invalid_value"),
    ({"presence_penalty": 1}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -1}, "frequency_penalty", "invalid_value"),
    ({"n": 3, "best_of": 2}, "best_of", "invalid_value"),
    ({"best_of": 129}, "best_of", "invalid_value"),
    ({"max_tokens": 0, "prompt_logprobs": 0}, "max_tokens", "invalid_value"),
    ({"length_penalty": 11}, "length_penalty", "invalid_value"),
    ({"length_penalty": "x"}, "length_penalty", "invalid_type"),
    ({"early_stopping": "never"}, "early_stopping", "invalid_type"),
    ({"use_beam_search": 1}, "use_beam_search", "invalid_type"),
    ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty", "invalid_value"),
    ({"use_beam_search": False, "early_stopping": True}, "early_stopping", "invalid_value"),
]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_what_does_not_go_with_it(tokenizer: Tokenizer, served: ServedModel, path: str, body: dict[str, Any]) -> None:
    api = Api(tokenizer, served)
    for change, param, code in BAD:
        assert api.error(path, **{**body, "use_beam_search": True, **change}) == (400, param, code), change
    assert api.generator.generations == []


def test_a_width_that_no_engine_has_is_refused_at_once(tokenizer: Tokenizer, served: ServedModel) -> None:
    """It would else hold up the queue until an engine had so many places, and be refused then."""
    api = Api(tokenizer, dataclasses.replace(served, max_beams=8))
    beams = {"prompt": "x", "use_beam_search": True, "max_tokens": 2}
    assert api.error("/v1/completions", **beams, best_of=9) == (400, "best_of", "invalid_value")
    assert api.error("/v1/completions", **beams, n=9) == (400, "n", "invalid_value")
    none = Api(tokenizer, dataclasses.replace(served, max_beams=0))
    assert none.error("/v1/completions", **beams) == (400, "use_beam_search", "invalid_value")
    assert api.generator.generations == none.generator.generations == []


def test_over_grpc(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served, script)
    with api.serving() as target, Client(target, timeout_s=PATIENCE_S) as client:
        whole = client.complete("x", use_beam_search=True, n=2, best_of=4, max_tokens=2, length_penalty=-1.0, early_stopping=True)
        assert [output.token_ids for output in whole.outputs] == [[70, 70], [71, 71]]
        events = list(client.generate("x", use_beam_search=True, n=2, best_of=4, max_tokens=2))
        assert {event.index: event.token_ids for event in events} == {0: [70, 70], 1: [71, 71]}
        bad: list[dict[str, Any]] = [{"stop": ["a"]}, {"temperature": 0.5}, {"length_penalty": 20.0}]
        for change in bad:
            with pytest.raises(RaylineError) as caught:
                client.complete("x", **{"use_beam_search": True, **change})
            assert (caught.value.code, [caught.value.field]) == (grpc.StatusCode.INVALID_ARGUMENT, list(change))
    first, second = (generation.params for generation in api.generator.generations)
    assert (first.n, first.beam_width, first.length_penalty, first.early_stopping) == (2, 4, -1.0, True)
    assert (second.n, second.beam_width, second.length_penalty, second.early_stopping) == (2, 4, 1.0, False)


def beams(choice: int, attempt: int) -> TokenDelta:
    return TokenDelta(request="r", attempt=attempt, choice=choice, index=0, tokens=[4, 5 + choice], finish="length")


def test_beams_start_over_when_their_engine_dies() -> None:
    """The journal asks for the places of all beams, and has nothing to take along."""
    journal = Journal(JournalConfig("router", "s!"))
    params = SamplingParams(max_tokens=2, n=2, beam_width=5)
    journal.begin(Generation("r", [1, 2, 3], params, timeout_s=60.0), arrival=0.0, now=0.0)
    for attempt, engine in enumerate(("a", "b")):
        (place,) = [send.message for send in journal.take_messages()]
        assert isinstance(place, Place)
        assert (place.sequences, place.num_tokens, place.longest, place.attempt) == (5, 3, 5, attempt)
        journal.receive(Placement("r", attempt, engine, 1, f"{engine}!", 0.0), 1.0)
        (submit,) = [send.message for send in journal.take_messages()]
        assert isinstance(submit, Submit)
        assert (submit.request.emitted, submit.request.finished) == ([[], []], [False, False])
        if engine == "a":
            journal.receive(Released("a", 1, [("r", 0)], "a worker died"), 2.0)
    journal.take_news()
    journal.receive(Deltas("a", 1, [beams(0, 0), beams(1, 0)]), 3.0)
    assert journal.take_news() == [], "of an engine that was cut off"
    journal.receive(Deltas("b", 1, [beams(0, 1), beams(1, 1)]), 3.0)
    (news,) = journal.take_news()
    assert [(delta.choice, delta.tokens, delta.finish) for delta in news.deltas] == [(0, [4, 5], "length"), (1, [4, 6], "length")]
    assert "r" not in journal


def test_a_width_that_the_engine_rejects_is_told() -> None:
    journal = Journal(JournalConfig("router", "s!"))
    journal.begin(Generation("r", [1], SamplingParams(max_tokens=2, beam_width=9), timeout_s=60.0), arrival=0.0, now=0.0)
    journal.receive(Placement("r", 0, "a", 1, "a!", 0.0), 1.0)
    journal.receive(Rejected("r", 0, "the beam width (9) exceeds the 8 sequences that run at once here"), 1.0)
    errors = [news.error for news in journal.take_news() if news.error is not None]
    assert [str(error) for error in errors] == ["the beam width (9) exceeds the 8 sequences that run at once here"]
