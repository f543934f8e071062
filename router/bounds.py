"""How many tokens a text has at least, from its length alone: a text far too long must not be encoded to be refused."""

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

from router.vocabulary import BYTE_CHARACTERS, Vocabulary

_KEEPING_SPLITS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}


@dataclass(frozen=True)
class Bound:
    """Each token stands for a bounded number of bytes."""

    most_bytes: int
    """Of one token."""
    composes: bool
    """Of the text in NFC, which may be shorter than as it was written (UAX #15)."""

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least."""
        text = unicodedata.normalize("NFC", text) if self.composes else text
        return -(-len(text.encode()) // self.most_bytes)


def bound_of(encoder: Any, vocabulary: Vocabulary) -> Bound | None:
    """What holds for `encoder`, a tokenizers.Tokenizer; None where there is no bound.

    There is none where text may vanish (stripped, replaced, dropped between words) or unknown characters run together.
    """
    strings = [vocabulary.token_string(token) for token in range(len(vocabulary))]
    splits = _steps(encoder.pre_tokenizer, "pretokenizers")
    norms = _steps(encoder.normalizer, "normalizers")
    added = encoder.get_added_tokens_decoder().values()
    composes = any(step["type"] == "NFC" for step in norms)
    if any(token.lstrip or token.rstrip for token in added):
        return None
    if composes and (norms[0]["type"] != "NFC" or not all(token.normalized or token.content.isascii() for token in added)):
        return None  # what such a token keeps apart may be longer composed
    if any(step["type"] not in _KEEPING_SPLITS or step.get("behavior") == "Removed" for step in splits):
        return None
    if not all(map(_keeps, norms)) or not _knows_all_bytes(encoder, vocabulary, set(strings), splits):
        return None
    sizes = (
        # Where the text's spaces become other characters, it is what they became that tokens are cut from.
        len(vocabulary.token_bytes(token) if vocabulary.byte_level else string.encode())
        for token, string in enumerate(strings)
    )
    return Bound(most, composes) if (most := max(sizes, default=0)) else None


def _keeps(step: dict[str, Any]) -> bool:
    """No step of the normalizer makes a text shorter, composition aside."""
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return replaced is not None and len(replaced.encode()) <= len(step["content"].encode())
    return step["type"] in ("NFC", "Prepend")


def _knows_all_bytes(encoder: Any, vocabulary: Vocabulary, known: set[str], splits: list[dict[str, Any]]) -> bool:
    """A word that is no token is cut further, down to its bytes. Models other than BPE put one unknown token for all of it."""
    model = encoder.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if vocabulary.byte_level:
        return any(step["type"] == "ByteLevel" for step in splits) and known >= BYTE_CHARACTERS
    return bool(model.byte_fallback) and known >= {f"<0x{byte:02X}>" for byte in range(256)}


def _steps(part: Any, members: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), members)


def _flat(state: dict[str, Any], members: str) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for member in state[members] for step in _flat(member, members)]
