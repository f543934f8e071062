"""/tokenize, /detokenize, /version; and how long a text may be before it is not even encoded."""

import importlib.metadata
import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from router.prepare import ServedModel
from router.schemas import MAX_TOKENIZED
from router.tokenizer import Tokenizer
from tests.router.conftest import CORPUS, TEMPLATE
from tests.router.fakes import Api

TEXT = "The <|im_start|>fox 🙂"


def test_a_prompt(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    ids = tokenizer.encode_now(TEXT, True)
    assert api.post("/tokenize", prompt=TEXT, model="tiny") == {
        "count": len(ids),
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": None,
    }
    strings = api.post("/tokenize", prompt=TEXT, return_token_strs=True)["token_strs"]
    assert strings == [tokenizer._encoder.id_to_token(token) for token in ids]
    assert api.post("/tokenize", prompt="")["tokens"] == []
    assert api.post("/tokenize", prompt="fox " * 2000)["count"] > 256, "longer than the context: that is what is asked"


def test_special_tokens_are_added_on_request(sentence_pieces: tokenizers.Tokenizer, served: ServedModel) -> None:
    api = Api(Tokenizer(sentence_pieces, {}, TEMPLATE), served)
    with_start = api.post("/tokenize", prompt="The fox")["tokens"]
    assert with_start[0] == 1
    assert api.post("/tokenize", prompt="The fox", add_special_tokens=False)["tokens"] == with_start[1:]
    messages = [{"role": "user", "content": "The fox"}]
    bare = api.post("/tokenize", messages=messages)["tokens"]
    assert bare[0] != 1
    assert api.post("/tokenize", messages=messages, add_special_tokens=True)["tokens"] == [1, *bare]


def test_messages(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    text = "<|im_start|>user\nHello<|im_end|>\n"
    assert api.post("/tokenize", messages=messages)["tokens"] == tokenizer.encode_now(text + "<|im_start|>assistant\n", False)
    without = api.post("/tokenize", messages=messages, add_generation_prompt=False)
    assert without["tokens"] == tokenizer.encode_now(text, False)


def test_detokenize(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    for text in (TEXT, "", "né🙃"):
        assert api.post("/detokenize", tokens=tokenizer.encode_now(text, False)) == {"prompt": text}
    ids = tokenizer.encode_now("ok🙃", False)
    assert api.post("/detokenize", tokens=ids[:-1]) == {"prompt": "ok�"}


def test_version(tokenizer: Tokenizer, served: ServedModel) -> None:
    response = Api(tokenizer, served).request("GET", "/version")
    assert response.json() == {"version": importlib.metadata.version("rayline")}


def test_what_is_too_long_to_be_worked_on(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(tokenizer, served)
    cases: list[tuple[str, str, Any]] = [("/tokenize", "prompt", "x"), ("/detokenize", "tokens", [5])]
    for path, param, one in cases:
        response = api.request("POST", path, json={param: one * (MAX_TOKENIZED + 1)})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert f"'{param}' must have at most {MAX_TOKENIZED} " in response.json()["error"]["message"]
    monkeypatch.setattr("router.prepare.MAX_TOKENIZED", 100)
    answer = (400, "messages", "invalid_value")
    assert api.error("/tokenize", messages=[{"role": "user", "content": "x" * 80}]) == answer
    api.post("/tokenize", messages=[{"role": "user", "content": "x" * 20}])


BAD: list[tuple[str, dict[str, Any], tuple[int, str | None, str]]] = [
    ("/tokenize", {}, (400, "prompt", "invalid_value")),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, (400, "prompt", "invalid_value")),
    ("/tokenize", {"prompt": ["a"]}, (400, "prompt", "invalid_type")),
    ("/tokenize", {"messages": []}, (400, "messages", "invalid_value")),
    ("/tokenize", {"messages": [{"role": "user"}]}, (400, "messages[0].content", "missing_required_parameter")),
    ("/tokenize", {"prompt": "a", "model": "other"}, (404, "model", "model_not_found")),
    ("/tokenize", {"prompt": "a", "add_special_token": True}, (400, "add_special_token", "unknown_parameter")),
    ("/detokenize", {}, (400, "tokens", "missing_required_parameter")),
    ("/detokenize", {"tokens": "a"}, (400, "tokens", "invalid_type")),
    ("/detokenize", {"tokens": [1, "a"]}, (400, "tokens[1]", "invalid_type")),
    ("/detokenize", {"tokens": [100000]}, (400, "tokens", "invalid_value")),
    ("/detokenize", {"tokens": [-1]}, (400, "tokens", "invalid_value")),
    ("/detokenize", {"tokens": [1], "model": "other"}, (404, "model", "model_not_found")),
]


@pytest.mark.parametrize(("path", "body", "answer"), BAD)
def test_bad_parameters(
    tokenizer: Tokenizer, served: ServedModel, path: str, body: dict[str, Any], answer: tuple[int, str | None, str]
) -> None:
    assert Api(tokenizer, served).error(path, **body) == answer


def test_messages_without_a_template(tokenizer: Tokenizer, served: ServedModel) -> None:
    bare = Api(Tokenizer(tokenizer._encoder, {}, None), served)
    assert bare.error("/tokenize", messages=[{"role": "user", "content": "x"}]) == (400, "messages", "no_chat_template")


def test_a_text_far_too_long_is_refused_unread(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> list[int]:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(tokenizer, "encode_now", unexpected)
    monkeypatch.setattr(tokenizer, "located", unexpected)
    api = Api(tokenizer, served)
    huge = "fox " * 2**20
    assert api.error("/v1/completions", prompt=["fine", huge]) == (400, "prompt", "context_length_exceeded")
    messages = [{"role": "user", "content": huge}]
    assert api.error("/v1/chat/completions", messages=messages) == (400, "messages", "context_length_exceeded")
    assert api.error("/v1/completions", prompt=huge, echo=True, max_tokens=0) == (400, "prompt", "context_length_exceeded")


def byte_level(**parts: Any) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = parts.get("splits") or pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    if "normalizer" in parts:
        encoder.normalizer = parts["normalizer"]
    alphabet = parts.get("alphabet") or pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=parts.get("size", 500), initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator([*CORPUS, "e\u0301\u0302 \u1fbe\u0308\u0301 " * 20], trainer)
    return encoder


LETTERS = st.text(st.sampled_from("ab 🙂é▁\n \u0301\u0308\u1fbe\u212b각") | st.characters(codec="utf-8"), max_size=60)
WORDS = st.lists(st.sampled_from(["The quick brown", "fox", "▁▁▁▁", "\u1fbe\u0308\u0301", "        "]), max_size=8).map("".join)


@given(text=LETTERS | WORDS)
def test_no_text_has_fewer_tokens_than_the_bound(sentence_pieces: tokenizers.Tokenizer, text: str) -> None:
    for encoder in (sentence_pieces, *_BOUNDED):
        tokenizer = Tokenizer(encoder, {}, None)
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode_now(text, True))


_BOUNDED = (byte_level(), byte_level(normalizer=normalizers.NFC()), byte_level(normalizer=normalizers.NFC(), size=256))
"""The last one has no tokens but the 256 bytes: its bound is exact."""


def test_composed_text_counts() -> None:
    tokenizer = Tokenizer(_BOUNDED[2], {}, None)
    for text in ("cafe\u0301", "\u1fbe\u0308\u0301" * 5, "plain", "각"):
        assert tokenizer.fewest_tokens(text) == len(tokenizer.encode_now(text, False))


def test_a_text_that_writes_the_sign_for_a_space_itself() -> None:
    """Its tokens stand for fewer bytes when decoded than it has."""
    strings = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁▁"]
    vocabulary = {string: token for token, string in enumerate(strings)}
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    encoder = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    encoder.normalizer = normalizers.Replace(" ", "▁")
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(encoder, {}, None)
    for text in ("▁" * 40, " " * 40):
        assert 0 < tokenizer.fewest_tokens(text) <= len(tokenizer.encode_now(text, False)) == 10


def test_the_bound_is_near(sentence_pieces: tokenizers.Tokenizer) -> None:
    """It would be useless if it never refused anything."""
    for encoder, share in ((sentence_pieces, 20), (_BOUNDED[0], 20), (_BOUNDED[1], 20)):
        text = "The quick brown fox jumps over the lazy dog. " * 100
        tokenizer = Tokenizer(encoder, {}, None)
        assert tokenizer.fewest_tokens(text) > len(tokenizer.encode_now(text, True)) / share


def test_where_text_may_vanish_there_is_no_bound(sentence_pieces: tokenizers.Tokenizer) -> None:
    stripped = byte_level()
    stripped.add_tokens([AddedToken("<x>", lstrip=True)])
    unknown = json.loads(sentence_pieces.to_str())
    unknown["model"]["byte_fallback"] = False
    words = byte_level()
    words.model = models.WordLevel({**words.get_vocab(), "[UNK]": 500}, "[UNK]")
    apart = byte_level(normalizer=normalizers.NFC())
    apart.add_special_tokens(["\u00e0"])
    vanishing = [
        stripped,
        words,
        apart,
        byte_level(normalizer=normalizers.Sequence([normalizers.Replace("a", "e\u0301"), normalizers.NFC()])),
        tokenizers.Tokenizer.from_str(json.dumps(unknown)),
        byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        byte_level(normalizer=normalizers.NFKC()),
        byte_level(normalizer=normalizers.Replace("aa", "a")),
        byte_level(normalizer=normalizers.Replace(tokenizers.Regex(" +"), " ")),
        byte_level(splits=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])),
        byte_level(splits=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
        byte_level(alphabet=["a", "b"]),
    ]
    assert [Tokenizer(encoder, {}, None).fewest_tokens("a" * 10**6) for encoder in vanishing] == [0] * len(vanishing)
