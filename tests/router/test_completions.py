"""/v1/completions, in process."""

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from router.generation import ChoiceDelta, Generation, Overloaded, TimedOut, TooLarge, Unavailable
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import NONE_CACHED, Api, Script, Step, one_by_one, with_logprobs

PATH = "/v1/completions"


def says(tokenizer: Tokenizer, text: str, finish: str | None = "length") -> Script:
    """Every choice says `text`, a token a step."""
    tokens = tokenizer.encode_now(text, False)
    return lambda generation: one_by_one(tokens, finish, generation.params.n)


def test_plain(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "over the lazy dog🙂"))
    answer = api.post(PATH, model="tiny", prompt="The quick", user="me", metadata={"a": "b"}, temperature=None)
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "over the lazy dog🙂",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    (generation,) = api.generator.generations
    prompt = tokenizer.encode_now("The quick", True)
    generated = len(tokenizer.encode_now("over the lazy dog🙂", False))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": generated,
        "total_tokens": len(prompt) + generated,
        **NONE_CACHED,
    }
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["id"].startswith("cmpl-")
    assert generation.prompt == prompt
    assert generation.timeout_s == served.timeout_s
    params = generation.params
    assert (params.max_tokens, params.temperature, params.logprobs, params.stop_token_ids) == (16, 1.0, None, (2,))
    assert api.generator.closed == [generation.id]


def test_parameters_reach_the_cluster(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(
        tokenizer, served, lambda g: with_logprobs(one_by_one([50], choices=g.params.n), lambda _: {5: -1.0, 6: -2.0, 7: -3.0})
    )
    asked: dict[str, Any] = {
        "n": 2, "seed": -1, "temperature": 1e-9, "top_k": -1, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100, "6": 2.5}, "logprobs": 3, "max_tokens": 40,
        "stop_token_ids": [9, 2], "cache_salt": "mine", "ignore_eos": True,
    }  # fmt: skip
    api.post(PATH, prompt=[5, 6], **asked)
    (generation,) = api.generator.generations
    params = generation.params
    assert (params.n, params.seed, params.temperature, params.top_k) == (2, 2**64 - 1, 0.0, 0)
    assert (params.top_p, params.min_p, params.repetition_penalty) == (0.5, 0.1, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.5, -0.5, {5: -100.0, 6: 2.5})
    assert (params.logprobs, params.max_tokens, params.stop_token_ids) == (3, 40, (9, 2))
    assert (generation.prompt, generation.cache_salt) == ([5, 6], "mine")


def test_seeds_are_drawn_where_none_is_given(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "x"))
    api.post(PATH, prompt=["a", "b"])
    drawn = {generation.params.seed for generation in api.generator.generations}
    assert len(drawn) == 2
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_prompts_and_choices_are_numbered(tokenizer: Tokenizer, served: ServedModel) -> None:
    """Choice c of prompt p is number p * n + c, however the answers come."""

    def script(generation: Generation) -> Iterator[Step]:
        if generation.prompt == [10]:
            yield asyncio.sleep(0.01)
        for choice in (1, 0):
            yield [ChoiceDelta(choice, [generation.prompt[0] + choice], [], "length")]

    vocabulary = tokenizer.vocabulary
    for stream in (False, True):
        api = Api(tokenizer, served, script)
        body: dict[str, Any] = {"prompt": [[10], [20], [30, 31]], "n": 2, "return_token_ids": True}
        if stream:
            choices = [choice for event in api.events(PATH, **body) for choice in event["choices"]]
            choices.sort(key=lambda choice: choice["index"])
        else:
            answer = api.post(PATH, **body)
            choices = answer["choices"]
            assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10, **NONE_CACHED}
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
        assert [choice["token_ids"] for choice in choices] == [[10], [11], [20], [21], [30], [31]]
        assert [choice["prompt_token_ids"] for choice in choices] == [[10], [10], [20], [20], [30, 31], [30, 31]]
        texts = [vocabulary.text_bytes(token).decode(errors="replace") for token in (10, 11, 20, 21, 30, 31)]
        assert [choice["text"] for choice in choices] == texts


def test_stop_string(tokenizer: Tokenizer, served: ServedModel) -> None:
    """It ends the text before it, and the choice with the token that completes it; what still comes is dropped."""
    api = Api(tokenizer, served, says(tokenizer, "The quick brown fox"))
    answer = api.post(PATH, prompt="x", stop=["zzz", "ck br"], n=2, return_token_ids=True)
    tokens = tokenizer.encode_now("The quick brown fox", False)
    upto = next(k for k in range(len(tokens)) if "ck br" in tokenizer._encoder.decode(tokens[:k]))
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The qui", "stop", "ck br")
        assert choice["token_ids"] == tokens[:upto]
    assert answer["usage"]["completion_tokens"] == 2 * upto
    (generation,) = api.generator.generations
    assert api.generator.finished_choices == [(generation.id, 0), (generation.id, 1)]
    assert api.generator.closed == [generation.id]


def test_stop_string_within_one_delta(tokenizer: Tokenizer, served: ServedModel) -> None:
    tokens = tokenizer.encode_now("a, b, c, d", False)
    api = Api(tokenizer, served, lambda _: [[ChoiceDelta(0, tokens, [], "length")]])
    answer = api.post(PATH, prompt="x", stop="b,")
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("a, ", "stop")
    assert answer["usage"]["completion_tokens"] < len(tokens)
    assert api.generator.finished_choices == [], "the engine had ended it already"


def test_end_of_sequence_and_stop_tokens(tokenizer: Tokenizer, served: ServedModel) -> None:
    """The token that ends a choice counts, but leaves no text; only the user's own are named as the reason."""
    fox = tokenizer.encode_now(" fox", False)
    for last, reason in ((2, None), (fox[-1], fox[-1])):
        api = Api(tokenizer, served, lambda _, last=last: one_by_one([*fox, last], "stop"))  # type: ignore[misc]
        answer = api.post(PATH, prompt="x", stop_token_ids=[fox[-1]])
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" fox", "stop", reason)
        assert answer["usage"]["completion_tokens"] == len(fox) + 1


def test_incomplete_character_at_the_end(tokenizer: Tokenizer, served: ServedModel) -> None:
    cut = tokenizer.encode_now("ok🙃", False)[:-1]
    assert Api(tokenizer, served, lambda _: one_by_one(cut)).post(PATH, prompt="x")["choices"][0]["text"] == "ok�"


def test_logprobs(tokenizer: Tokenizer, served: ServedModel) -> None:
    text = "né 🙂"
    tokens = tokenizer.encode_now(text, False)
    script: Script = lambda _: with_logprobs(one_by_one(tokens), lambda t: {t: -t / 1000, 10: float("-inf")})  # noqa: E731
    body: dict[str, Any] = {"prompt": "x", "logprobs": 2}
    (choice,) = Api(tokenizer, served, script).post(PATH, **body)["choices"]
    told = choice["logprobs"]
    data = [tokenizer.vocabulary.token_bytes(token) for token in tokens]
    assert told["token_logprobs"] == [-t / 1000 for t in tokens]
    for token, name, piece, offset in zip(tokens, told["tokens"], data, told["text_offset"], strict=True):
        before = b"".join(data[: data.index(piece)])
        assert offset == len(before.decode(errors="ignore"))
        assert name.startswith("bytes:\\x") or text[offset:].startswith(name)
        assert told["top_logprobs"][tokens.index(token)] == {
            name: -token / 1000,
            tokenizer.vocabulary.token_bytes(10).decode(): -9999.0,
        }
    assert any(name.startswith("bytes:\\x") for name in told["tokens"])
    events = Api(tokenizer, served, script).events(PATH, **body)
    for key, values in told.items():
        streamed = [v for event in events for c in event["choices"] if c["logprobs"] for v in c["logprobs"][key]]
        assert streamed == values


def test_stream_says_what_the_whole_says(tokenizer: Tokenizer, served: ServedModel) -> None:
    text = "Grüße aus Köln! 🙂🙃 The dog does not mind at all."
    body: dict[str, Any] = {"prompt": "x", "n": 2, "stop": ["not mind"], "return_token_ids": True}
    whole = Api(tokenizer, served, says(tokenizer, text)).post(PATH, **body)
    api = Api(tokenizer, served, says(tokenizer, text))
    events = api.events(PATH, **body, stream_options={"include_usage": True})
    assert {event["id"] for event in events} == {events[0]["id"]}
    *chunks, last = events
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in part for part in parts[1:])
    assert not any("�" in c["text"] for chunk in chunks for c in chunk["choices"])


def test_stream_without_text_is_silent(tokenizer: Tokenizer, served: ServedModel) -> None:
    """What shows nothing is not sent, but for the end."""
    api = Api(tokenizer, served, lambda _: [[], *one_by_one([0, 1, 0], None), [ChoiceDelta(0, [], [], "length")]])
    (event,) = api.events(PATH, prompt="x")
    assert (event["choices"][0]["text"], event["choices"][0]["finish_reason"]) == ("", "length")
    assert "usage" not in event


FAILURES = [
    (Overloaded(2.4), 429, None, "rate_limit_exceeded"),
    (Unavailable("no engine"), 503, None, "unavailable"),
    (TimedOut("too late"), 504, None, "timeout"),
    (TooLarge("larger than the pool"), 400, "prompt", "context_length_exceeded"),
    (RuntimeError("secret"), 500, None, "internal_error"),
]


@pytest.mark.parametrize(("failure", "status", "param", "code"), FAILURES)
def test_failures(tokenizer: Tokenizer, served: ServedModel, failure: Exception, status: int, param: str | None, code: str) -> None:
    for stream in (False, True):
        api = Api(tokenizer, served, lambda _: [failure])
        assert api.error(PATH, prompt="x", stream=stream) == (status, param, code)
        response = api.request("POST", PATH, json={"prompt": "x", "stream": stream, "max_tokens": 5})
        assert response.headers.get("retry-after") == ("3" if status == 429 else None)
        assert response.json()["error"]["param"] == ("max_tokens" if param else None)
        assert "secret" not in response.text
        response = api.request("POST", PATH, json={"prompt": "x", "echo": True, "stream": stream, "max_tokens": 0})
        assert response.json()["error"]["param"] == param, "where nothing is generated, only the prompt can be too large"
    # After the start of the stream the error is an event.
    api = Api(tokenizer, served, lambda _: [*one_by_one(tokenizer.encode_now("ab", False), None), failure])
    *_, last = api.events(PATH, prompt="x")
    assert last["error"]["code"] == code
    assert api.generator.closed == [api.generator.generations[0].id]


def test_one_failure_ends_all(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        yield []
        yield [ChoiceDelta(0, [50])]
        if generation.prompt == [7]:
            yield Unavailable("dead")
        yield asyncio.sleep(3600)

    api = Api(tokenizer, served, script)
    assert api.error(PATH, prompt=[[5], [6], [7]]) == (503, None, "unavailable")
    assert sorted(api.generator.closed) == sorted(generation.id for generation in api.generator.generations)
    assert len(api.generator.closed) == 3


def test_a_broken_generator_is_an_internal_error(tokenizer: Tokenizer, served: ServedModel) -> None:
    for script in (one_by_one([50], None), [[ChoiceDelta(0, [], [], "error")]], []):
        api = Api(tokenizer, served, lambda _, script=script: script)  # type: ignore[misc]
        assert api.error(PATH, prompt="x") == (500, None, "internal_error")


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [["a"]]}, "prompt", "invalid_type"),
    ({"prompt": ["a", [1]]}, "prompt", "invalid_type"),
    ({"prompt": [1, True]}, "prompt", "invalid_type"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": ["a"] * 257}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 9, "n": 128}, "n", "invalid_value"),
    ({"prompt": [100000]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [5] * 256}, "prompt", "context_length_exceeded"),
    ({"prompt": [5] * 200, "max_tokens": 57}, "max_tokens", "context_length_exceeded"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "invalid_value"),
    ({"prompt": "a", "temperature": True}, "temperature", "invalid_type"),
    ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
    ({"prompt": "a", "top_p": 1.1}, "top_p", "invalid_value"),
    ({"prompt": "a", "top_k": -2}, "top_k", "invalid_value"),
    ({"prompt": "a", "min_p": 2}, "min_p", "invalid_value"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"prompt": "a", "repetition_penalty": 10.1}, "repetition_penalty", "invalid_value"),
    ({"prompt": "a", "repetition_penalty": 1e300}, "repetition_penalty", "invalid_value"),
    ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"prompt": "a", "n": 0}, "n", "invalid_value"),
    ({"prompt": "a", "n": 129}, "n", "invalid_value"),
    ({"prompt": "a", "n": 1.5}, "n", "invalid_type"),
    ({"prompt": "a", "seed": 2**64}, "seed", "invalid_value"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": ""}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": [1]}, "stop", "invalid_type"),
    ({"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids", "invalid_value"),
    ({"prompt": "a", "stop_token_ids": ["a"]}, "stop_token_ids[0]", "invalid_type"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"1": "2"}}, "logit_bias", "invalid_type"),
    ({"prompt": "a", "logit_bias": {"99999": 2}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 2}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"prompt": "a", "echo": 1}, "echo", "invalid_type"),
    ({"prompt": [5] * 257, "max_tokens": 0, "echo": True}, "prompt", "context_length_exceeded"),
    ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs", "invalid_value"),
    ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"prompt": "a", "suffix": "z"}, "suffix", "unsupported_parameter"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "invalid_value"),
    ({"prompt": "a", "best_of": 129}, "best_of", "invalid_value"),
    ({"prompt": ["a"] * 9, "best_of": 128}, "best_of", "invalid_value"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"prompt": "a", "n": 2, "best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"prompt": "a", "min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", "invalid_value"),
    ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
    ({"prompt": "a", "include_stop_str_in_output": 1}, "include_stop_str_in_output", "invalid_type"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"prompt": "a", "temprature": 2}, "temprature", "unknown_parameter"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD)
def test_bad_parameters(tokenizer: Tokenizer, served: ServedModel, body: dict[str, Any], param: str | None, code: str) -> None:
    api = Api(tokenizer, served)
    assert api.error(PATH, **body) == (400, param, code)
    assert api.generator.generations == []


def test_a_text_may_have_tokens_that_the_model_lacks(tokenizer: Tokenizer) -> None:
    small = ServedModel("tiny", max_model_len=256, vocab_size=len(tokenizer.vocabulary) - 1)
    for echo in (False, True):
        assert Api(tokenizer, small).error(PATH, prompt="naïve", echo=echo) == (400, "prompt", "invalid_value")


def test_neutral_values_pass(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "x"))
    neutral: dict[str, Any] = {"echo": False, "suffix": "", "best_of": 1, "response_format": {"type": "text"}, "min_tokens": 0}
    api.post(PATH, prompt="a", stop=None, stop_token_ids=None, logit_bias=None, n=None, stream=None, **neutral)
    api.post(PATH, prompt=[5] * 200, max_tokens=56)
    api.post(PATH, prompt=[5] * 250)
    assert api.generator.generations[-1].params.max_tokens == 6


def test_broken_bodies(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(tokenizer, served, says(tokenizer, "x"))

    def code(content: bytes, kind: str | None = "application/json") -> tuple[int, str]:
        response = api.request("POST", PATH, content=content, headers={"content-type": kind} if kind else {})
        return response.status_code, response.json()["error"]["code"] if response.status_code != 200 else ""

    good = b'{"prompt": "a"}'
    assert code(good) == code(good, "application/json; charset=utf-8") == code(good, None) == (200, "")
    assert code(b"{") == code(b"") == code(b'{"prompt": "\\ud800"}') == code(b"\xff") == (400, "invalid_json")
    assert code(b"[]") == code(b"3") == (400, "invalid_type")
    assert code(b'{"prompt": "a", "temperature": NaN}') == (400, "invalid_value")
    assert code(good, "text/plain") == code(good, "application/x-www-form-urlencoded") == (415, "unsupported_media_type")
    monkeypatch.setattr("router.api.MAX_BODY_BYTES", 10)
    assert code(good) == (413, "body_too_large")


def test_cached_tokens_are_told_over_all_prompts(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        cached = generation.prompt[0] // 2
        yield [ChoiceDelta(choice, [50], cached_tokens=cached if choice == 0 else None) for choice in range(2)]
        yield [ChoiceDelta(choice, [51], [], "length") for choice in range(2)]

    api = Api(tokenizer, served, script)
    answer = api.post(PATH, prompt=[[8, 9], [6, 7]], n=2, max_tokens=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}


def test_what_speculation_did_is_told_over_all_choices_and_prompts(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        yield [ChoiceDelta(choice, [50], verified=(0, 0)) for choice in range(2)]
        yield [ChoiceDelta(0, [51, 52], verified=(4, 1)), ChoiceDelta(1, [51], verified=(2, 0))]
        yield [ChoiceDelta(0, [53], [], "length", verified=(0, 0)), ChoiceDelta(1, [52, 53], [], "length", verified=(1, 1))]

    api = Api(tokenizer, served, script)
    body: dict[str, Any] = {"prompt": [[8, 9], [6, 7]], "n": 2, "max_tokens": 4}
    counted = {"proposed_tokens": 14, "accepted_tokens": 4, "steps": 6}
    assert api.post(PATH, **body)["usage"]["speculative"] == counted
    assert api.events(PATH, **body, stream_options={"include_usage": True})[-1]["usage"]["speculative"] == counted
    chat = "/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "a"}], "n": 2, "max_tokens": 4}
    counted = {"proposed_tokens": 7, "accepted_tokens": 2, "steps": 3}
    assert api.post(chat, **body)["usage"]["speculative"] == counted
    assert api.events(chat, **body, stream_options={"include_usage": True})[-1]["usage"]["speculative"] == counted


def test_prefixes_are_kept_apart_by_api_key_where_that_is_asked(tokenizer: Tokenizer, served: ServedModel) -> None:
    def salts(model: ServedModel) -> list[str]:
        api = Api(tokenizer, model, lambda _: one_by_one([50]))
        for key, salt in (("Bearer a", ""), ("Bearer a", ""), ("Bearer b", ""), ("Bearer a", "mine"), ("", "")):
            headers = {"authorization": key} if key else {}
            assert api.request("POST", PATH, json={"prompt": [5, 6], "cache_salt": salt}, headers=headers).status_code == 200
        return [generation.cache_salt for generation in api.generator.generations]

    shared = salts(served)
    assert shared == ["", "", "", "mine", ""]
    apart = salts(dataclasses.replace(served, apart_by_key=True))
    assert apart[0] == apart[1]
    assert len(set(apart)) == 4
    assert not any("Bearer" in salt for salt in apart)
