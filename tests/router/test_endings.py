"""What ends an output and what of it shows: stop strings, stop tokens, special tokens, min_tokens."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protocol import SamplingParams
from router.choice import Choice, Reading
from router.generation import ChoiceDelta
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, one_by_one

PATH = "/v1/completions"
END = 2
"""<|im_end|>"""


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(False, True, "a fox"), (True, True, "a fox"), (False, False, "a fox"), (True, False, "a fox<|im_end|>")],
)
def test_the_end_of_sequence_shows_only_where_both_are_asked(
    tokenizer: Tokenizer, served: ServedModel, include: bool, skip: bool, text: str
) -> None:
    tokens = [*tokenizer.encode_now("a fox", False), END]
    api = Api(tokenizer, served, lambda _: one_by_one(tokens, "stop"))
    body: dict[str, Any] = {"prompt": "x", "include_stop_str_in_output": include, "skip_special_tokens": skip}
    (choice,) = api.post(PATH, **body)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", None)
    assert "".join(c["text"] for event in api.events(PATH, **body) for c in event["choices"]) == text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_with_text(tokenizer: Tokenizer, served: ServedModel, include: bool) -> None:
    *before, last = tokenizer.encode_now("brown fox", False)
    api = Api(tokenizer, served, lambda _: one_by_one([*before, last], "stop"))
    (choice,) = api.post(PATH, prompt="x", stop_token_ids=[last], include_stop_str_in_output=include)["choices"]
    shown = [*before, last] if include else before
    assert choice["text"] == b"".join(map(tokenizer.vocabulary.token_bytes, shown)).decode()
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", last)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_belongs_to_the_text(tokenizer: Tokenizer, served: ServedModel, stream: bool) -> None:
    tokens = tokenizer.encode_now("The quick brown fox", False)
    api = Api(tokenizer, served, lambda _: one_by_one(tokens))
    body: dict[str, Any] = {"prompt": "x", "stop": ["zzz", "ck br"], "include_stop_str_in_output": True}
    answers = api.events(PATH, **body) if stream else [api.post(PATH, **body)]
    choices = [choice for answer in answers for choice in answer["choices"]]
    assert "".join(choice["text"] for choice in choices) == "The quick br"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "ck br")


def test_special_tokens_show_where_they_are_not_skipped(tokenizer: Tokenizer, served: ServedModel) -> None:
    tokens = [1, *tokenizer.encode_now("é", False), 0, *tokenizer.encode_now("!", False)]
    api = Api(tokenizer, served, lambda _: one_by_one(tokens))
    assert api.post(PATH, prompt="x")["choices"][0]["text"] == "é!"
    body: dict[str, Any] = {"prompt": "x", "skip_special_tokens": False}
    assert api.post(PATH, **body)["choices"][0]["text"] == "<|im_start|>é<|endoftext|>!"
    (choice,) = api.post(PATH, **body, stop="<|endo")["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("<|im_start|>é", "<|endo")


def test_min_tokens_reach_the_cluster(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, lambda _: one_by_one([70]))
    api.post(PATH, prompt="x", min_tokens=16)
    api.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], min_tokens=5, max_completion_tokens=5)
    assert [generation.params.min_tokens for generation in api.generator.generations] == [16, 5]


def test_a_stop_string_that_overlaps_one_that_came_too_early(tokenizer: Tokenizer, served: ServedModel) -> None:
    (letter,) = tokenizer.encode_now("a", False)
    api = Api(tokenizer, served, lambda _: one_by_one([letter] * 5))
    (choice,) = api.post(PATH, prompt="x", stop="aa", min_tokens=2, return_token_ids=True)["choices"]
    assert (choice["text"], choice["token_ids"], choice["stop_reason"]) == ("a", [letter] * 3, "aa")


@given(data=st.data())
def test_the_first_stop_string_that_is_complete_after_min_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Against a search of all beginnings of the text, token by token, however the tokens come."""
    letters = {letter: tokenizer.encode_now(letter, False)[0] for letter in "ab"}
    text = data.draw(st.text("ab", min_size=1, max_size=14))
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True))
    least = data.draw(st.integers(0, 14))
    include = data.draw(st.booleans())
    wanted, ended = text, None
    for count in range(least + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:count].endswith(stop)]
        if complete:
            ended = max(complete, key=len)
            wanted = text[:count] if include else text[: count - len(ended)]
            break
    choice = Choice(tokenizer.vocabulary, [], SamplingParams(max_tokens=99, min_tokens=least), Reading(tuple(stops), include))
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=4))})
    given_text, reason = "", None
    for begin, end in pairwise(cuts):
        finish = "length" if end == len(text) else None
        choice.feed(ChoiceDelta(0, [letters[letter] for letter in text[begin:end]], finish=finish))  # type: ignore[arg-type]
        gained = choice.take()
        given_text += gained.text
        reason = gained.stop_reason or reason
    assert (given_text, reason) == (wanted, ended)
    assert choice.finish == ("length" if ended is None else "stop")
