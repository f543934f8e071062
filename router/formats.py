"""Increments of text as OpenAI's answers: one format per endpoint, each for whole answers and for streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, Raw, Struct, UnsetType, json

from cluster.protocol import TokenLogprobs
from router.choice import Increment
from router.prompt import Prompt
from router.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    PromptLogprob,
    PromptLogprobs,
    TokenIds,
    TopLogprob,
    Usage,
)
from router.vocabulary import Vocabulary

LEAST_LOGPROB = -9999.0
"""JSON has no infinity: what a token without any probability is given."""


@dataclass(frozen=True)
class Shown:
    """What a client asked to be told besides the text."""

    logprobs: int | None = None
    """So many likeliest tokens with each token of the output, and of an echoed prompt."""
    prompt_logprobs: int | None = None
    token_ids: bool = False
    usage: bool = False
    """Chunks have a usage field, null but for the last."""
    echo: bool = False


class Format(Protocol):
    """How an endpoint writes what was generated. One per request: streams remember which choices have begun."""

    def size(self, index: int, prompt: Prompt, gained: Increment) -> int:
        """How many tokens and log-probabilities there are to write of choice `index`, its prompt's included until it has begun."""
        ...

    def chunks(self, index: int, prompt: Prompt, gained: Increment) -> list[Struct]:
        """What a stream says of choice `index`; nothing where the increment shows nothing."""
        ...

    def usage_chunk(self, usage: Usage) -> Struct:
        """The last chunk of a stream with include_usage."""
        ...

    def whole(self, outputs: Sequence[tuple[Prompt, Increment]], usage: Usage) -> Struct:
        """The answer in one piece; per choice its prompt and all it gained."""
        ...


class _Base:
    def __init__(self, id: str, created: int, model: str, vocabulary: Vocabulary, shown: Shown) -> None:
        self._id = id
        self._created = created
        self._model = model
        self._vocabulary = vocabulary
        self._shown = shown
        self._logprobs = shown.logprobs is not None
        self._usage = None if shown.usage else UNSET
        self._begun: set[int] = set()
        self._told_prompts: dict[Prompt, Raw] = {}
        self._entries = 1 + (shown.logprobs or 0)
        self._prompt_entries = int(shown.token_ids)
        if shown.echo and self._logprobs:
            self._prompt_entries += self._entries
        if shown.prompt_logprobs is not None:
            self._prompt_entries += 1 + shown.prompt_logprobs

    def size(self, index: int, prompt: Prompt, gained: Increment) -> int:
        size = len(gained.tokens) * self._entries
        return size if index in self._begun else size + len(prompt.tokens) * self._prompt_entries

    def _shows(self, gained: Increment) -> bool:
        asked = self._shown.token_ids or self._logprobs
        return bool(gained.text) or gained.finish is not None or (asked and bool(gained.tokens))

    def _ids(self, tokens: list[int]) -> TokenIds:
        return tokens if self._shown.token_ids else UNSET

    def _prompt_logprobs(self, prompt: Prompt) -> PromptLogprobs:
        if self._shown.prompt_logprobs is None:
            return UNSET
        if (known := self._told_prompts.get(prompt)) is not None:
            return known
        told = [b"null"]
        for token, entry in zip(prompt.tokens[1:], prompt.scores, strict=True):
            named = {token: PromptLogprob(_finite(entry.logprob), entry.rank, self._token(token)[0])}
            likeliest = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._shown.prompt_logprobs]
            for rank, (other, logprob) in enumerate(likeliest, 1):
                named.setdefault(other, PromptLogprob(_finite(logprob), rank, self._token(other)[0]))
            told.append(json.encode(named))
        self._told_prompts[prompt] = Raw(b"[%b]" % b",".join(told))
        return self._told_prompts[prompt]

    def _token(self, token: int) -> tuple[str, bytes]:
        data = self._vocabulary.token_bytes(token)
        return data.decode("utf-8", "replace"), data


class CompletionFormat(_Base):
    """/v1/completions."""

    def __init__(self, id: str, created: int, model: str, vocabulary: Vocabulary, shown: Shown) -> None:
        super().__init__(id, created, model, vocabulary, shown)
        self._echoed: dict[Prompt, CompletionLogprobs] = {}

    def chunks(self, index: int, prompt: Prompt, gained: Increment) -> list[Struct]:
        if not self._shows(gained):
            return []
        choices = [self._choice(index, prompt, gained)]
        if index not in self._begun:
            self._begun.add(index)
            if self._shown.echo:
                logprobs = self._told_prompt(prompt) if self._logprobs else None
                choices.insert(0, CompletionChoice(index=index, text=prompt.text, logprobs=logprobs, finish_reason=None))
                choices[0].token_ids = self._ids([])
            choices[0].prompt_token_ids = self._ids(prompt.tokens)
        return [self._completion([choice], self._usage) for choice in choices]

    def usage_chunk(self, usage: Usage) -> Struct:
        return self._completion([], usage)

    def whole(self, outputs: Sequence[tuple[Prompt, Increment]], usage: Usage) -> Struct:
        choices = []
        for index, (prompt, gained) in enumerate(outputs):
            choice = self._choice(index, prompt, gained)
            choice.prompt_token_ids = self._ids(prompt.tokens)
            choice.prompt_logprobs = self._prompt_logprobs(prompt)
            if self._shown.echo:
                choice.text = prompt.text + choice.text
                choice.logprobs = _joined(self._told_prompt(prompt), choice.logprobs) if self._logprobs else None
            choices.append(_written(choice))
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice] | list[Raw], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, prompt: Prompt, gained: Increment) -> CompletionChoice:
        offsets = [len(prompt.text) + offset for offset in gained.offsets]
        return CompletionChoice(
            index=index,
            text=gained.text,
            logprobs=self._told(gained.tokens, gained.logprobs, offsets) if self._logprobs and gained.tokens else None,
            finish_reason=gained.finish,
            stop_reason=gained.stop_reason,
            token_ids=self._ids(gained.tokens),
        )

    def _told_prompt(self, prompt: Prompt) -> CompletionLogprobs:
        if (known := self._echoed.get(prompt)) is not None:
            return known
        first = CompletionLogprobs(prompt.offsets[:1], [None], [self._name(prompt.tokens[0])], [None])
        told = self._echoed[prompt] = _joined(first, self._told(prompt.tokens[1:], prompt.scores, prompt.offsets[1:]))
        return told

    def _told(self, tokens: list[int], entries: list[TokenLogprobs], offsets: list[int]) -> CompletionLogprobs:
        chosen = [self._name(token) for token in tokens]
        most = self._shown.logprobs or 0
        top: list[dict[str, float] | None] = [
            # The chosen token is always among them: k or k + 1 entries.
            {self._name(i): _finite(v) for i, v in zip(entry.top_ids[:most], entry.top_logprobs[:most], strict=True)}
            | {name: _finite(entry.logprob)}
            for name, entry in zip(chosen, entries, strict=True)
        ]
        return CompletionLogprobs(offsets, [_finite(entry.logprob) for entry in entries], chosen, top)

    def _name(self, token: int) -> str:
        """A token as the key of a dictionary: part of a character is written in bytes, so that two of them don't collide."""
        data = self._vocabulary.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatFormat(_Base):
    """/v1/chat/completions."""

    def chunks(self, index: int, prompt: Prompt, gained: Increment) -> list[Struct]:
        if not self._shows(gained):
            return []
        chunks: list[Struct] = []
        if index not in self._begun:
            role = ChatChunkChoice(index=index, delta=Delta("assistant", ""), logprobs=None, finish_reason=None)
            chunks.append(self._chunk([role], self._usage, UNSET if self._begun else self._ids(prompt.tokens)))
            self._begun.add(index)
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=gained.text) if gained.text else Delta(),
            logprobs=self._told(gained) if self._logprobs and gained.tokens else None,
            finish_reason=gained.finish,
            stop_reason=gained.stop_reason,
            token_ids=self._ids(gained.tokens),
        )
        chunks.append(self._chunk([choice], self._usage, UNSET))
        return chunks

    def usage_chunk(self, usage: Usage) -> Struct:
        return self._chunk([], usage, UNSET)

    def whole(self, outputs: Sequence[tuple[Prompt, Increment]], usage: Usage) -> Struct:
        choices = [
            _written(
                ChatChoice(
                    index=index,
                    message=ChatMessage(gained.text),
                    logprobs=self._told(gained) if self._logprobs else None,
                    finish_reason=gained.finish,
                    stop_reason=gained.stop_reason,
                    token_ids=self._ids(gained.tokens),
                )
            )
            for index, (_, gained) in enumerate(outputs)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._ids(outputs[0][0].tokens),
            prompt_logprobs=self._prompt_logprobs(outputs[0][0]),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None, prompt: TokenIds) -> ChatChunk:
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, prompt_token_ids=prompt
        )

    def _told(self, gained: Increment) -> ChatLogprobs:
        return ChatLogprobs([self._entry(token, entry) for token, entry in zip(gained.tokens, gained.logprobs, strict=True)])

    def _entry(self, token: int, entry: TokenLogprobs) -> ChatLogprob:
        text, data = self._token(token)
        top = [TopLogprob(*self._token_and(i, logprob)) for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        return ChatLogprob(text, _finite(entry.logprob), list(data), top)

    def _token_and(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        text, data = self._token(token)
        return text, _finite(logprob), list(data)


def _written(choice: Struct) -> Raw:
    """A choice of a whole answer: written by itself, since nothing else runs in the process while one piece is written."""
    return Raw(json.encode(choice))


def _joined(first: CompletionLogprobs, second: CompletionLogprobs | None) -> CompletionLogprobs:
    """One list after the other."""
    if second is None:
        return first
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
