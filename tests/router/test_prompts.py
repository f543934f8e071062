"""What an answer says of its prompt: echo, prompt_logprobs, and requests for nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tokenizers

from cluster.protocol import TokenLogprobs
from router.generation import ChoiceDelta, Generation
from router.prepare import ServedModel
from router.prompt import echoed
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Script, Step

PATH = "/v1/completions"
LIKELY = {60: -0.25, 61: -1.5, 62: float("-inf")}
"""The likeliest tokens everywhere, as the scripted cluster has it."""


def entry(token: int, count: int | None, rank: int | None = None) -> TokenLogprobs:
    top = list(LIKELY.items())[: count or 0]
    return TokenLogprobs(-token / 1000, [token for token, _ in top], [logprob for _, logprob in top], rank)


def scores(output: Sequence[int]) -> Script:
    """Prompt positions two at a time; then every choice puts `output` out, a token a step, or ends where no token is wanted."""

    def script(generation: Generation) -> Iterator[Step]:
        params, prompt = generation.params, generation.prompt
        if params.prompt_logprobs is not None:
            for begin in range(1, len(prompt), 2):
                told = [entry(token, params.prompt_logprobs, rank=token) for token in prompt[begin : begin + 2]]
                yield [ChoiceDelta(0, [], prompt_logprobs=told)]
        if params.max_tokens == 0:
            yield [ChoiceDelta(c, [], finish="length") for c in range(params.n)]
            return
        for i, token in enumerate(output):
            logprobs = [] if params.logprobs is None else [entry(token, params.logprobs)]
            finish = "length" if i == len(output) - 1 else None
            yield [ChoiceDelta(c, [token], logprobs, finish) for c in range(params.n)]  # type: ignore[arg-type]

    return script


def test_prompt_logprobs_as_vllm_tells_them(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, scores([70, 71]))
    (choice,) = api.post(PATH, prompt=[5, 60, 7, 8], prompt_logprobs=2)["choices"]
    (generation,) = api.generator.generations
    assert (generation.params.prompt_logprobs, generation.params.logprobs) == (2, None)
    first, own_is_likely, *others = choice["prompt_logprobs"]
    assert first is None

    def name(token: int) -> str:
        return tokenizer.vocabulary.token_bytes(token).decode(errors="replace")

    assert own_is_likely == {
        "60": {"logprob": -0.06, "rank": 60, "decoded_token": name(60)},
        "61": {"logprob": -1.5, "rank": 2, "decoded_token": name(61)},
    }
    for token, told in zip((7, 8), others, strict=True):
        assert list(told) == [str(token), "60", "61"]
        assert told[str(token)] == {"logprob": -token / 1000, "rank": token, "decoded_token": name(token)}
        assert told["60"] == {"logprob": -0.25, "rank": 1, "decoded_token": name(60)}
    assert choice["logprobs"] is None
    assert choice["text"] == name(70) + name(71)


def test_a_chat_has_its_prompt_logprobs_once(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, scores([70]))
    answer = api.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], prompt_logprobs=0, n=2, max_tokens=1)
    (generation,) = api.generator.generations
    assert [None if told is None else list(told) for told in answer["prompt_logprobs"]] == [
        None,
        *([str(token)] for token in generation.prompt[1:]),
    ]
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["The quick brown 🙂", "a", [60, 8, 9]])
def test_echo_with_logprobs(tokenizer: Tokenizer, served: ServedModel, prompt: str | list[int], stream: bool) -> None:
    output = tokenizer.encode_now(" fox é", False)
    body: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 2, "n": 2, "return_token_ids": True}
    api = Api(tokenizer, served, scores(output))
    for choice in both(api, stream, body):
        (generation,) = api.generator.generations[-1:]
        ids = [*generation.prompt, *output]
        data = [tokenizer.vocabulary.token_bytes(token) for token in ids]
        told = choice["logprobs"]
        assert choice["text"] == b"".join(data).decode()
        assert choice["token_ids"] == output
        assert choice["prompt_token_ids"] == generation.prompt
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        assert told["token_logprobs"][1:] == [-token / 1000 for token in ids[1:]]
        for i, token in enumerate(ids):
            assert told["text_offset"][i] == len(b"".join(data[:i]).decode(errors="ignore"))
            assert told["tokens"][i].startswith("bytes:") or told["tokens"][i].encode() == data[i]
            if i:
                names = {tokenizer.vocabulary.token_bytes(t).decode(): v for t, v in list(LIKELY.items())[:2]}
                assert told["top_logprobs"][i] == {**names, told["tokens"][i]: -token / 1000}
        assert "prompt_logprobs" not in choice


def both(api: Api, stream: bool, body: dict[str, Any]) -> list[Any]:
    """The choices of an answer, whichever way it comes. In a stream, each choice's prompt comes alone and first."""
    if not stream:
        return list(api.post(PATH, **body)["choices"])
    whole: dict[int, Any] = {}
    for event in api.events(PATH, **body):
        for part in event["choices"]:
            known = whole.setdefault(part["index"], part)
            if known is not part:
                known["text"] += part["text"]
                known["token_ids"] = known.get("token_ids", []) + part.get("token_ids", [])
                known["finish_reason"] = part["finish_reason"]
                for key, values in (part["logprobs"] or {}).items():
                    known["logprobs"][key] += values
            else:
                assert part["finish_reason"] is None
                assert part.get("token_ids", []) == []
    return [whole[index] for index in sorted(whole)]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_logprobs_with_lists_and_choices(tokenizer: Tokenizer, served: ServedModel, stream: bool) -> None:
    api = Api(tokenizer, served, scores(tokenizer.encode_now("!", False)))
    choices = both(api, stream, {"prompt": ["one", "two"], "echo": True, "n": 2})
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["one!", "one!", "two!", "two!"]
    assert all(generation.params.prompt_logprobs is None for generation in api.generator.generations)


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_alone(tokenizer: Tokenizer, served: ServedModel, stream: bool) -> None:
    """As lm-eval-harness asks: nothing is generated."""
    api = Api(tokenizer, served, scores([]))
    (choice,) = both(api, stream, {"prompt": "The quick", "echo": True, "logprobs": 1, "max_tokens": 0})
    prompt = tokenizer.encode_now("The quick", True)
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 1000 for token in prompt[1:])]
    (generation,) = api.generator.generations
    assert (generation.params.max_tokens, generation.params.prompt_logprobs) == (0, 1)


def test_scoring_without_echo_and_of_a_prompt_that_fills_the_context(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, scores([]))
    answer = api.post(PATH, prompt=[5] * 256, prompt_logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], len(choice["prompt_logprobs"])) == ("", "length", 256)
    assert answer["usage"] == {"prompt_tokens": 256, "completion_tokens": 0, "total_tokens": 256}
    (choice,) = api.post(PATH, prompt="alone", echo=True, max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("alone", None)


def test_both_counts_at_once(tokenizer: Tokenizer, served: ServedModel) -> None:
    """Echoed log-probabilities and prompt_logprobs are one measurement, each shown at its own length."""
    api = Api(tokenizer, served, scores([70]))
    (choice,) = api.post(PATH, prompt=[5, 6], echo=True, logprobs=1, prompt_logprobs=2)["choices"]
    assert api.generator.generations[0].params.prompt_logprobs == 2
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2
    assert len(choice["prompt_logprobs"][1]) == 3
    (choice,) = api.post(PATH, prompt=[5, 6], echo=True, logprobs=2, prompt_logprobs=1)["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3
    assert len(choice["prompt_logprobs"][1]) == 2


def test_a_character_between_prompt_and_output(tokenizer: Tokenizer, served: ServedModel) -> None:
    ids = tokenizer.encode_now("ok🙃", False)
    api = Api(tokenizer, served, scores(ids[-1:]))
    (choice,) = api.post(PATH, prompt=ids[:-1], echo=True)["choices"]
    assert choice["text"] == "ok🙃"
    (choice,) = api.post(PATH, prompt=ids[:-1], echo=True, max_tokens=0)["choices"]
    assert choice["text"] == "ok�"


def test_special_tokens_of_an_echoed_prompt(tokenizer: Tokenizer, served: ServedModel) -> None:
    text = "<|im_start|>you<|im_end|>!"
    api = Api(tokenizer, served, scores([70]))
    last = tokenizer.vocabulary.token_bytes(70).decode()
    assert api.post(PATH, prompt=text, echo=True)["choices"][0]["text"] == text + last, "a text is echoed as it was written"
    ids = tokenizer.encode_now(text, False)
    assert api.post(PATH, prompt=ids, echo=True)["choices"][0]["text"] == "you!" + last
    assert api.post(PATH, prompt=ids, echo=True, skip_special_tokens=False)["choices"][0]["text"] == text + last


def test_offsets_point_into_the_text_as_it_was_written(sentence_pieces: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentence_pieces, {}, None)
    for text in ("The quick brown fox", " The quick", "a</s>b é"):
        tokens = tokenizer.encode_now(text, True)
        prompt = echoed(tokenizer.vocabulary, tokens, text, show_special=False)
        assert prompt.text == text
        names = [tokenizer.vocabulary.token_bytes(token).decode(errors="ignore") for token in tokens]
        assert tokens[0] == 1
        for name, offset in zip(names[1:], prompt.offsets[1:], strict=True):
            assert text[offset:].startswith((name, name.lstrip())), (name, offset)
