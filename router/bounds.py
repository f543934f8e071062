"""How many tokens a text has at least, from its length alone: a text far too long must not be encoded to be refused."""

import json
from typing import Any

from router.vocabulary import BYTE_CHARACTERS, Vocabulary

NFC_SHRINKS = 4
"""Composing characters (UAX #15) takes less than three quarters of their bytes in UTF-8 (iota subscript alone, diaeresis and acute:
7 bytes become 2)."""
_KEEPING_SPLITS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}


def most_bytes_per_token(encoder: Any, vocabulary: Vocabulary) -> int | None:
    """The most bytes of a text that can become one token of `encoder`, a tokenizers.Tokenizer; None where there is no bound.

    There is none where text may vanish (stripped, replaced, dropped between words) or unknown characters run together.
    """
    strings = [vocabulary.token_string(token) for token in range(len(vocabulary))]
    splits = _steps(encoder.pre_tokenizer, "pretokenizers")
    if any(token.lstrip or token.rstrip for token in encoder.get_added_tokens_decoder().values()):
        return None
    if any(step["type"] not in _KEEPING_SPLITS or step.get("behavior") == "Removed" for step in splits):
        return None
    shrinks = _shrinks(encoder)
    if shrinks is None or not _knows_all_bytes(encoder, vocabulary, set(strings), splits):
        return None
    sizes = (
        # Where the text's spaces become other characters, it is what they became that tokens are cut from.
        len(vocabulary.token_bytes(token) if vocabulary.byte_level else string.encode())
        for token, string in enumerate(strings)
    )
    return shrinks * max(sizes, default=0) or None


def _shrinks(encoder: Any) -> int | None:
    """How many times shorter the normalizer can make a text; None if there is no limit."""
    shrinks = 1
    for step in _steps(encoder.normalizer, "normalizers"):
        if step["type"] == "NFC":
            shrinks = NFC_SHRINKS
        elif step["type"] == "Replace":
            replaced = step["pattern"].get("String")
            if replaced is None or len(replaced.encode()) > len(step["content"].encode()):
                return None
        elif step["type"] != "Prepend":
            return None
    return shrinks


def _knows_all_bytes(encoder: Any, vocabulary: Vocabulary, known: set[str], splits: list[dict[str, Any]]) -> bool:
    if vocabulary.byte_level:
        return any(step["type"] == "ByteLevel" for step in splits) and known >= BYTE_CHARACTERS
    return bool(getattr(encoder.model, "byte_fallback", False)) and known >= {f"<0x{byte:02X}>" for byte in range(256)}


def _steps(part: Any, members: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), members)


def _flat(state: dict[str, Any], members: str) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for member in state[members] for step in _flat(member, members)]
