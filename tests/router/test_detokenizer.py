"""Text that comes token by token is the text of all tokens."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from router.detokenizer import Detokenizer, StopFinder
from router.tokenizer import Tokenizer
from router.vocabulary import Vocabulary

_FEW = settings(max_examples=150, deadline=None)
_TEXTS = st.text(st.sampled_from("ab 🙂é你👩‍👧.\n") | st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=30)


def stream(vocabulary: Vocabulary, tokens: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary, prompt)
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.flush()]


@_FEW
@given(data=st.data())
def test_byte_level_any_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer.vocabulary) - 1), max_size=40))
    assert "".join(stream(tokenizer.vocabulary, tokens, [])) == tokenizer._encoder.decode(tokens)


@_FEW
@given(text=_TEXTS)
def test_byte_level_text_has_no_replacement(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode_now(text, False)
    pieces = stream(tokenizer.vocabulary, tokens, [])
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@_FEW
@given(before=_TEXTS, after=_TEXTS)
def test_sentence_pieces_continue_the_prompt(sentence_pieces: tokenizers.Tokenizer, before: str, after: str) -> None:
    vocabulary = Tokenizer(sentence_pieces, {}, None).vocabulary
    prompt = sentence_pieces.encode(before).ids
    tokens = sentence_pieces.encode(after, add_special_tokens=False).ids
    whole = sentence_pieces.decode(prompt + tokens)
    assert whole == before + "".join(stream(vocabulary, tokens, prompt))


@_FEW
@given(text=_TEXTS)
def test_sentence_pieces_alone(sentence_pieces: tokenizers.Tokenizer, text: str) -> None:
    """After a prompt without text, the space that the encoder put in front is taken off again."""
    vocabulary = Tokenizer(sentence_pieces, {}, None).vocabulary
    tokens = sentence_pieces.encode(text, add_special_tokens=False).ids
    assert "".join(stream(vocabulary, tokens, [1])) == text == sentence_pieces.decode(tokens)


def test_incomplete_character_is_held_back(tokenizer: Tokenizer) -> None:
    byte = {tokenizer.vocabulary.token_bytes(t): t for t in range(len(tokenizer.vocabulary))}
    first, *rest = [byte[bytes([value])] for value in "🙂".encode()]
    assert stream(tokenizer.vocabulary, [first, *rest], []) == ["", "", "", "🙂", ""]
    assert stream(tokenizer.vocabulary, [first], []) == ["", "�"]
    assert stream(tokenizer.vocabulary, rest, [first]) == ["", "", "🙂", ""], "the prompt ended within a character"
    assert stream(tokenizer.vocabulary, rest, [first, *[0] * 20]) == ["", "", "🙂", ""], "tokens without text came after it"
    assert stream(tokenizer.vocabulary, [], [first]) == [""]


def test_special_tokens_are_silent_but_have_names(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    assert [vocabulary.token_bytes(t) for t in (0, 1, 2)] == [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]
    assert [vocabulary.text_bytes(t) for t in (0, 1, 2, 10**6)] == [b"", b"", b"", b""]
    think = tokenizer.encode_now("<think>naïve", False)
    assert [vocabulary.text_bytes(t).decode("latin-1") for t in think] == ["<think>", "na\xefve"]


_LETTERS = st.text("ab", min_size=1, max_size=5)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By brute force: the first to be complete, the longest of several."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text("ab", max_size=6), max_size=10), stops=st.lists(_LETTERS, max_size=4, unique=True))
def test_stop_strings_against_brute_force(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    given_out = ""
    so_far = ""
    for piece in pieces:
        given_out += finder.feed(piece)
        so_far += piece
        text, stop = first_stop(so_far, stops)
        assert finder.found == stop
        assert text.startswith(given_out)
        if stop is None:
            held = so_far[len(given_out) :]
            longest = max((k for s in stops for k in range(len(s)) if so_far.endswith(s[:k])), default=0)
            assert len(held) == longest, "no more is held back than could begin a stop string"
    assert (given_out + finder.flush(), finder.found) == first_stop("".join(pieces), stops)


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never"), None])
@_FEW
@given(data=st.data())
def test_other_decoders(sentence_pieces: tokenizers.Tokenizer, decoder: decoders.Decoder | None, data: st.DataObject) -> None:
    encoder = tokenizers.Tokenizer.from_str(sentence_pieces.to_str())
    encoder.decoder = decoder
    vocabulary = Tokenizer(encoder, {}, None).vocabulary
    # These decoders go with a splitting into words, under which a token has its space in front and nowhere else.
    words = [token for content, token in encoder.get_vocab().items() if "▁" not in content[1:]]
    tokens = data.draw(st.lists(st.sampled_from(sorted(words)), max_size=8))
    assert "".join(stream(vocabulary, tokens, [])) == encoder.decode(tokens)
