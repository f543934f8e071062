"""What an answer says of its prompt: echo, prompt_logprobs, and requests for nothing else."""

import pkgutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cluster.protocol import TokenLogprobs
from router.formats import CompletionFormat
from router.generation import ChoiceDelta, Generation
from router.prepare import ServedModel
from router.prompt import echoed
from router.tokenizer import Tokenizer
from tests.router.conftest import CORPUS
from tests.router.fakes import NONE_CACHED, Api, Script, Step

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
    assert answer["usage"] == {"prompt_tokens": 256, "completion_tokens": 0, "total_tokens": 256, **NONE_CACHED}
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
    assert tokenizer.located("<s>The", True)[1][:3] == [0, 0, 3], "the first was put there, the second is spelled out"
    for text in ("The quick brown fox", " The quick", "a</s>b é"):
        tokens = tokenizer.encode_now(text, True)
        assert tokenizer.located(text, True)[0] == tokens
        offsets = tokenizer.located(text, True)[1]
        names = [tokenizer.vocabulary.token_bytes(token).decode(errors="ignore") for token in tokens]
        assert tokens[0] == 1
        for name, offset in zip(names[1:], offsets[1:], strict=True):
            assert text[offset:].startswith((name, name.lstrip())), (name, offset)


def byte_level(prefix: bool = False, processor: Any = None, normalizer: Any = None) -> Tokenizer:
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    encoder.decoder = decoders.ByteLevel()
    if processor is not None:
        encoder.post_processor = processor
    if normalizer is not None:
        encoder.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator([*CORPUS, " fox" * 20], trainer)
    encoder.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    return Tokenizer(encoder, {}, None)


TRIMMING = processors.ByteLevel(trim_offsets=True)
AROUND = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


@pytest.mark.parametrize(
    ("tokenizer", "text", "wanted"),
    [
        (byte_level(normalizer=normalizers.NFC()), "cafe\u0301 cafe\u0301 fox", {" fox": 11}),
        (byte_level(normalizer=normalizers.Strip()), "   fox fox  ", {" fox": 6}),
        (byte_level(prefix=True), "The fox", {" The": 0, " fox": 3}),
        (byte_level(prefix=True, processor=TRIMMING), "The fox", {" The": 0, " fox": 3}),
        (byte_level(processor=TRIMMING), "The  fox  ", {"The": 0, " fox": 4}),
        (byte_level(), "The  <x>  fox", {"The": 0, "<x>": 3}),
        (byte_level(processor=AROUND), "<s>The fox", {"The": 3, " fox": 6, "</s>": 10}),
    ],
)
def test_offsets_where_the_tokenizer_changes_the_text(tokenizer: Tokenizer, text: str, wanted: dict[str, int]) -> None:
    tokens, offsets = tokenizer.located(text, True)
    told = {tokenizer.vocabulary.token_bytes(token).decode(errors="replace"): o for token, o in zip(tokens, offsets, strict=True)}
    assert {name: told.get(name) for name in wanted} == wanted
    assert offsets == sorted(offsets)


_PLAIN = (byte_level(), byte_level(processor=TRIMMING))


@given(text=st.text(st.sampled_from("ab fox 🙂é👩‍👧.\n") | st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_offsets_of_a_text_are_those_of_its_tokens(text: str) -> None:
    for tokenizer in _PLAIN:
        tokens, offsets = tokenizer.located(text, False)
        read = echoed(tokenizer.vocabulary, tokens, show_special=True)
        assert (read.text, read.offsets) == (text, offsets)


@pytest.mark.parametrize(
    ("asked", "stream"),
    [({"prompt_logprobs": 2}, False), ({"echo": True, "logprobs": 2}, False), ({"echo": True, "logprobs": 2}, True)],
)
def test_what_is_told_of_a_prompt_is_made_once_for_all_its_choices(
    tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], stream: bool
) -> None:
    named: list[int] = []

    def watched(original: Callable[[CompletionFormat, int], Any]) -> Callable[[CompletionFormat, int], Any]:
        def name(form: CompletionFormat, token: int) -> Any:
            named.append(token)
            return original(form, token)

        return name

    for method in ("_name", "_token"):
        monkeypatch.setattr(CompletionFormat, method, watched(getattr(CompletionFormat, method)))
    counts = []
    for n in (1, 4):
        named.clear()
        answer = both(Api(tokenizer, served, scores([])), stream, {"prompt": [5, 6, 7], "max_tokens": 0, "n": n, **asked})
        assert len(answer) == n
        assert all({**choice, "index": 0} == answer[0] for choice in answer)
        counts.append(len(named))
    assert counts[0] == counts[1] > 0


def test_what_is_told_of_prompts_is_bounded(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.prepare.MAX_TOLD", 48)
    api = Api(tokenizer, served, scores([]))
    body: dict[str, Any] = {"prompt": [[5] * 5, [6] * 3], "max_tokens": 0}
    for asked in ({"prompt_logprobs": 2}, {"echo": True, "logprobs": 2}):
        api.post(PATH, **body, **asked, n=2)
        (param,) = asked.keys() - {"echo"}
        assert api.error(PATH, **body, **asked, n=3) == (400, param, "invalid_value")
        assert api.error(PATH, **body, **{**asked, param: 3}, n=2) == (400, param, "invalid_value")
    api.post(PATH, **body, n=8, echo=True)
    assert api.error(PATH, **body, n=4, best_of=8, echo=True, logprobs=2)[1] == "logprobs"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0, "prompt_logprobs": 0, "n": 8}
    api.post("/v1/chat/completions", **chat)


def test_ids_that_do_not_fit_are_refused_unread(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("router.prepare.echoed", unexpected)
    api = Api(tokenizer, served, scores([]))
    body: dict[str, Any] = {"prompt": [[5], [5] * 257], "echo": True, "max_tokens": 0}
    assert api.error(PATH, **body) == (400, "prompt", "context_length_exceeded")


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "The fox " * 10}], "max_tokens": 1}
LONG: dict[str, Any] = {"prompt": [5] * 100, "echo": True, "logprobs": 1, "max_tokens": 0}


@pytest.mark.parametrize(
    ("path", "body", "work"),
    [
        (PATH, LONG, "router.prepare.echoed"),
        (PATH, LONG, "router.formats.CompletionFormat.whole"),
        (PATH, {**LONG, "stream": True}, "router.formats.CompletionFormat.chunks"),
        (PATH, {**LONG, "prompt": "The fox " * 20}, "router.tokenizer.Tokenizer.located"),
        (PATH, {"prompt": "The fox " * 20, "max_tokens": 1}, "router.tokenizer.Tokenizer.encode_now"),
        ("/v1/chat/completions", CHAT, "router.tokenizer.Tokenizer.encode_now"),
        ("/v1/chat/completions", CHAT, "router.tokenizer.Tokenizer.render"),
        ("/tokenize", {"prompt": "The fox " * 20}, "router.tokenizer.Tokenizer.encode_now"),
        ("/tokenize", {"messages": CHAT["messages"]}, "router.tokenizer.Tokenizer.render"),
        ("/tokenize", {"prompt": "🙃" * 30, "return_token_strs": True}, "router.vocabulary.Vocabulary.token_string"),
        ("/detokenize", {"tokens": [5] * 100}, "router.detokenizer.Detokenizer.feed"),
    ],
)
def test_long_work_is_done_beside_the_event_loop(
    tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], work: str
) -> None:
    threads = set()
    original = pkgutil.resolve_name(work)

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread())
        return original(*args, **kwargs)

    monkeypatch.setattr(work, watched)
    for inline, beside in ((10**6, False), (50, True)):
        monkeypatch.setattr("router.offload.INLINE", inline)
        threads.clear()
        response = Api(tokenizer, served, scores([70])).request("POST", path, json=body)
        assert response.status_code == 200, response.text
        assert threads
        assert (threading.main_thread() not in threads) is beside
