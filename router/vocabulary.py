"""What each token of a vocabulary stands for, as bytes.

Text is bytes before it is characters: one character may be spread over several tokens. A tokenizer's decoder turns tokens into text
as a whole; the kinds known here (byte-level, and the SentencePiece family with its replaced spaces and byte tokens) do it token by
token on bytes, which is what makes decoding incremental, and log-probabilities' `bytes` exact.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from cluster.config import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Rule = Callable[[str], str]


class Vocabulary:
    """Token id -> bytes. Ids without a token (padding of the embedding matrix) stand for nothing."""

    def __init__(self, tokens: dict[str, int], special: Iterable[int], decoder: dict[str, Any] | None) -> None:
        """`decoder` as in tokenizer.json; `special` are the ids that never show in text.

        Raises ConfigError where the decoder is of a kind that does not work token by token.
        """
        size = max(tokens.values(), default=-1) + 1
        self._content: list[str | None] = [None] * size
        for content, token in tokens.items():
            self._content[token] = content
        self._known: list[bytes | None] = [None] * size
        self.special = frozenset(special)
        """Tokens that never show in text."""
        self.byte_level = False
        """Tokens are bytes, written as printable characters."""
        self._byte_fallback = False
        self._rules: list[_Rule] = []
        self.leading_spaces = 0
        """How many spaces the decoder takes off the start of a text: those its encoder put there."""
        self._read(decoder)

    def __len__(self) -> int:
        return len(self._content)

    def text_bytes(self, token: int) -> bytes:
        """What the token adds to the text; nothing if it is special."""
        return b"" if token in self.special else self.token_bytes(token)

    def token_string(self, token: int) -> str:
        """The token as the vocabulary spells it, with the signs that stand for spaces and bytes."""
        known = self._content[token] if 0 <= token < len(self._content) else None
        return known or ""

    def token_bytes(self, token: int) -> bytes:
        """The token itself: a special one by its name."""
        if not 0 <= token < len(self._known):
            return b""
        known = self._known[token]
        if known is None:
            known = self._known[token] = self._bytes(token)
        return known

    def _bytes(self, token: int) -> bytes:
        content = self._content[token]
        if content is None:
            return b""
        if token in self.special:
            return content.encode()
        if self.byte_level:
            try:
                return bytes(_CHARACTER_BYTE[character] for character in content)
            except KeyError:  # an added token: written as it is
                return content.encode()
        if self._byte_fallback and (found := _BYTE_TOKEN.fullmatch(content)):
            return bytes([int(found[1], 16)])
        for rule in self._rules:
            content = rule(content)
        return content.encode()

    def _read(self, decoder: dict[str, Any] | None) -> None:
        if decoder is None:  # tokenizers joins the tokens with spaces
            self._rules.append(lambda content: " " + content)
            self.leading_spaces = 1
            return
        parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        fused = False
        for part in parts:
            kind = part["type"]
            if kind == "ByteLevel":
                self.byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._rules.append(_replacing(part["replacement"], " "))
                self.leading_spaces = 0 if part.get("prepend_scheme") == "never" else 1
            elif kind == "Replace" and "String" in part["pattern"]:
                self._rules.append(_replacing(part["pattern"]["String"], part["content"]))
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and part["content"] == " " and not part["stop"]:
                self.leading_spaces = part["start"]
            else:
                raise ConfigError(f"tokenizer.json has a decoder of type {kind}, which cannot be streamed")
        if self.byte_level and (self._rules or self._byte_fallback):
            raise ConfigError("tokenizer.json mixes a ByteLevel decoder with others, which cannot be streamed")


def _replacing(old: str, new: str) -> _Rule:
    return lambda content: content.replace(old, new)


def _character_byte() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes: a byte that prints stands for itself, the others follow from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printing}
    others = (byte for byte in range(256) if byte not in set(printing))
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_CHARACTER_BYTE = _character_byte()
BYTE_CHARACTERS = frozenset(_CHARACTER_BYTE)
"""How a byte-level vocabulary spells the 256 bytes."""
