"""/v1/chat/completions, in process."""

from pathlib import Path
from typing import Any

import pytest

from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import NONE_CACHED, Api, Script, one_by_one, with_logprobs

PATH = "/v1/chat/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


def says(tokenizer: Tokenizer, text: str) -> Script:
    tokens = [*tokenizer.encode_now(text, False), 2]
    return lambda generation: one_by_one(tokens, "stop", generation.params.n)


def test_plain(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "Ça va? 🙂"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "Ok", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "user", "content": "", "name": "me"},
    ]
    answer = api.post(PATH, model="tiny", messages=messages, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Ça va? 🙂", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert answer["object"] == "chat.completion"
    (generation,) = api.generator.generations
    text = "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n"
        for role, content in [("system", "Be brief."), ("user", "a\nb"), ("assistant", "Ok"), ("user", "")]
    )
    assert generation.prompt == tokenizer.encode_now(text + "<|im_start|>assistant\n", False)
    assert generation.params.max_tokens == served.max_model_len - len(generation.prompt), "the rest of the context"
    assert answer["prompt_token_ids"] == generation.prompt
    assert choice["token_ids"] == [*tokenizer.encode_now("Ça va? 🙂", False), 2]
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_max_tokens_has_two_names(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "x"))
    for asked in ({"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}):
        api.post(PATH, messages=HELLO, **asked)
        assert api.generator.generations[-1].params.max_tokens == 7
    api.post(PATH, messages=HELLO, max_completion_tokens=5, max_tokens=0)
    assert api.generator.generations[-1].params.max_tokens == 5
    for name in ("max_tokens", "max_completion_tokens"):
        assert api.error(PATH, messages=HELLO, **{name: 250}) == (400, name, "context_length_exceeded")
    long = [{"role": "user", "content": "fox " * 300}]
    assert api.error(PATH, messages=long) == (400, "messages", "context_length_exceeded")


def test_stream(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, says(tokenizer, "Grüße! 🙂"))
    events = api.events(PATH, messages=HELLO, n=2, stream_options={"include_usage": True}, return_token_ids=True)
    *chunks, last = events
    prompt = len(api.generator.generations[0].prompt)
    tokens = [*tokenizer.encode_now("Grüße! 🙂", False), 2]
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 2 * len(tokens),
        "total_tokens": prompt + 2 * len(tokens),
        **NONE_CACHED,
    }
    assert "prompt_token_ids" in chunks[0]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    for index in range(2):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == "Grüße! 🙂"
        assert [token for part in parts for token in part.get("token_ids", [])] == tokens
        assert (parts[-1]["delta"], parts[-1]["finish_reason"]) == ({}, "stop")
        assert {part["finish_reason"] for part in parts[:-1]} == {None}
        assert not any("role" in part["delta"] for part in parts[1:])
    assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize("top", [None, 0, 2])
def test_logprobs(tokenizer: Tokenizer, served: ServedModel, top: int | None) -> None:
    tokens = [*tokenizer.encode_now("é🙃", False), 2]
    script: Script = lambda _: with_logprobs(  # noqa: E731
        one_by_one(tokens, "stop"), lambda t: {t: -t / 1000, 11: float("-inf")} if top else {}
    )
    api = Api(tokenizer, served, script)
    (choice,) = api.post(PATH, messages=HELLO, logprobs=True, top_logprobs=top)["choices"]
    content = choice["logprobs"]["content"]
    assert api.generator.generations[0].params.logprobs == (top or 0)
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "é🙃<|im_end|>".encode()
    assert [entry["logprob"] for entry in content] == [-t / 1000 for t in tokens]
    for entry in content:
        own = {key: entry[key] for key in ("token", "logprob", "bytes")}
        other = {"token": tokenizer.vocabulary.token_bytes(11).decode(), "bytes": list(tokenizer.vocabulary.token_bytes(11))}
        assert entry["top_logprobs"] == ([own, {**other, "logprob": -9999.0}] if top else [])
    events = api.events(PATH, messages=HELLO, logprobs=True, top_logprobs=top)
    streamed = [e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert streamed == content


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "Hello"}, "messages", "invalid_type"),
    ({"messages": ["Hello"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls", "unsupported_parameter"),
    ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"messages": HELLO, "tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format", "unsupported_parameter"),
    ({"messages": HELLO, "logprobs": 2}, "logprobs", "invalid_type"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"messages": HELLO, "prompt": "x"}, "prompt", "unknown_parameter"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"messages": HELLO, "max_completion_tokens": 0, "max_tokens": 5}, "max_completion_tokens", "invalid_value"),
    ({"messages": HELLO, "echo": True}, "echo", "unsupported_parameter"),
    ({"messages": HELLO, "best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"messages": HELLO, "min_tokens": 8, "max_completion_tokens": 7}, "min_tokens", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD)
def test_bad_parameters(tokenizer: Tokenizer, served: ServedModel, body: dict[str, Any], param: str, code: str) -> None:
    api = Api(tokenizer, served)
    assert api.error(PATH, **body) == (400, param, code)
    assert api.generator.generations == []


def test_template_variables_and_refusal(model_path: Path, served: ServedModel) -> None:
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(model_path / "tokenizer.json"))
    source = "{% if refuse %}{{ raise_exception('no such talk') }}{% endif %}{{ mood }}{{ add_generation_prompt }}"
    tokenizer = Tokenizer(encoder, {}, source)
    api = Api(tokenizer, served, says(tokenizer, "x"))
    api.post(PATH, messages=HELLO, chat_template_kwargs={"mood": "fine"}, add_generation_prompt=False)
    assert encoder.decode(api.generator.generations[0].prompt) == "fineFalse"
    response = api.request("POST", PATH, json={"messages": HELLO, "chat_template_kwargs": {"refuse": True}})
    assert response.status_code == 400
    assert "no such talk" in response.json()["error"]["message"]
    bare = Api(Tokenizer(encoder, {}, None), served)
    assert bare.error(PATH, messages=HELLO) == (400, "messages", "no_chat_template")
