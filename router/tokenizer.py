"""A model directory's tokenizer, without transformers: text and messages to tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from cluster.config import ConfigError
from router.bounds import Bound, bound_of
from router.chat_template import ChatTemplate
from router.vocabulary import Vocabulary

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """tokenizer.json with what tokenizer_config.json and chat_template.jinja add to it."""

    def __init__(self, encoder: Any, config: Mapping[str, Any], template: str | None) -> None:
        """`encoder` is a tokenizers.Tokenizer. Raises ConfigError as `load` does."""
        encoder.no_truncation()
        encoder.no_padding()
        self._encoder = encoder
        named = {name: content for name in _SPECIAL if (content := _content(config.get(name))) is not None}
        added: dict[int, Any] = encoder.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        special |= {token for content in named.values() if (token := encoder.token_to_id(content)) is not None}
        decoder = None if encoder.decoder is None else json.loads(encoder.decoder.__getstate__())
        self.vocabulary = Vocabulary(encoder.get_vocab(with_added_tokens=True), special, decoder)
        self.eos_token_id: int | None = encoder.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self._template = None if template is None else ChatTemplate(template, named)
        self._bound: Bound | None = bound_of(encoder, self.vocabulary)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, known without encoding it; 0 where the tokenizer gives no such bound."""
        return 0 if self._bound is None else self._bound.fewest_tokens(text)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The chat as the text the model was trained on (to be encoded without special tokens: the template spells them out).

        Raises ValueError where there is no template, or where it refuses these messages.
        """
        if self._template is None:
            raise ValueError("This model has no chat template; use /v1/completions.")
        return self._template.render(messages, add_generation_prompt, variables or {})

    def encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids; special tokens that the text spells out are recognized, those that start a text are added on request.

        It takes a second for a million characters, most of it without the GIL.
        """
        ids: list[int] = self._encoder.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def located(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids, and for each the character of `text` at which it starts: none before its predecessor.

        A token of part of a character starts with that. One that the tokenizer put there starts where the token before it ends. A
        token's leading spaces are its own, whatever the tokenizer says of them.
        """
        encoding = self._encoder.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        starts, last, reached = [], 0, 0
        for token, (begin, end) in zip(ids, encoding.offsets, strict=True):
            start = max(begin, last) if end else reached
            data = self.vocabulary.token_bytes(token)
            spaces = len(data) - len(data.lstrip(b" "))
            while spaces and start > reached and text[start - 1] == " ":
                start -= 1
                spaces -= 1
            starts.append(start)
            last, reached = start, max(reached, end)
        return ids, starts


def load(path: Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises ConfigError where it is missing, broken or of a kind that can't be streamed."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{path} has no tokenizer.json")
    try:
        encoder = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for all that can be wrong with a file
        raise ConfigError(f"{file} cannot be read: {error}") from None
    config = _read_config(path / "tokenizer_config.json")
    return Tokenizer(encoder, config, _template_source(path, config))


def _template_source(path: Path, config: Mapping[str, Any]) -> str | None:
    """The file wins over the config's entry, which is one template or a list of named ones."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / 'chat_template.jinja'} cannot be read: {error}") from None
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = next((named.get("template") for named in entry if isinstance(named, dict) and named.get("name") == "default"), None)
    if entry is not None and not isinstance(entry, str):
        raise ConfigError(f"{path / 'tokenizer_config.json'}: chat_template must be a text or a list of named texts")
    return entry


def _content(entry: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object")
    return content
