"""Increments of text as OpenAI's answers: one format per endpoint, each for whole answers and for streams."""

from collections.abc import Sequence
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from cluster.protocol import TokenLogprobs
from router.choice import Increment
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
    TokenIds,
    TopLogprob,
    Usage,
)
from router.vocabulary import Vocabulary

LEAST_LOGPROB = -9999.0
"""JSON has no infinity: what a token without any probability is given."""


class Format(Protocol):
    """How an endpoint writes what was generated. One per request: streams remember which choices have begun."""

    def chunks(self, index: int, prompt: list[int], gained: Increment) -> list[Struct]:
        """What a stream says of choice `index`; nothing where the increment shows nothing."""
        ...

    def usage_chunk(self, usage: Usage) -> Struct:
        """The last chunk of a stream with include_usage."""
        ...

    def whole(self, outputs: Sequence[tuple[list[int], Increment]], usage: Usage) -> Struct:
        """The answer in one piece; per choice its prompt and all it gained."""
        ...


class _Base:
    def __init__(
        self, id: str, created: int, model: str, vocabulary: Vocabulary, *, logprobs: bool, token_ids: bool, usage: bool
    ) -> None:
        """`logprobs` and `token_ids`: the client asked for them. `usage`: chunks have a usage field, null but for the last."""
        self._id = id
        self._created = created
        self._model = model
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._usage = None if usage else UNSET
        self._begun: set[int] = set()

    def _shows(self, gained: Increment) -> bool:
        asked = self._token_ids or self._logprobs
        return bool(gained.text) or gained.finish is not None or (asked and bool(gained.tokens))

    def _ids(self, tokens: list[int]) -> TokenIds:
        return tokens if self._token_ids else UNSET

    def _token(self, token: int) -> tuple[str, bytes]:
        data = self._vocabulary.token_bytes(token)
        return data.decode("utf-8", "replace"), data


class CompletionFormat(_Base):
    """/v1/completions."""

    def chunks(self, index: int, prompt: list[int], gained: Increment) -> list[Struct]:
        if not self._shows(gained):
            return []
        choice = self._choice(index, gained)
        if self._token_ids and index not in self._begun:
            self._begun.add(index)
            choice.prompt_token_ids = prompt
        return [self._completion([choice], self._usage)]

    def usage_chunk(self, usage: Usage) -> Struct:
        return self._completion([], usage)

    def whole(self, outputs: Sequence[tuple[list[int], Increment]], usage: Usage) -> Struct:
        choices = []
        for index, (prompt, gained) in enumerate(outputs):
            choice = self._choice(index, gained)
            choice.prompt_token_ids = self._ids(prompt)
            choices.append(choice)
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, gained: Increment) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=gained.text,
            logprobs=self._told(gained) if self._logprobs and gained.tokens else None,
            finish_reason=gained.finish,
            stop_reason=gained.stop_reason,
            token_ids=self._ids(gained.tokens),
        )

    def _told(self, gained: Increment) -> CompletionLogprobs:
        chosen = [self._name(token) for token in gained.tokens]
        top = [
            # The chosen token is always among them: k or k + 1 entries.
            {self._name(i): _finite(v) for i, v in zip(entry.top_ids, entry.top_logprobs, strict=True)}
            | {name: _finite(entry.logprob)}
            for name, entry in zip(chosen, gained.logprobs, strict=True)
        ]
        return CompletionLogprobs(gained.offsets, [_finite(entry.logprob) for entry in gained.logprobs], chosen, top)

    def _name(self, token: int) -> str:
        """A token as the key of a dictionary: part of a character is written in bytes, so that two of them don't collide."""
        data = self._vocabulary.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatFormat(_Base):
    """/v1/chat/completions."""

    def chunks(self, index: int, prompt: list[int], gained: Increment) -> list[Struct]:
        if not self._shows(gained):
            return []
        chunks: list[Struct] = []
        if index not in self._begun:
            role = ChatChunkChoice(index=index, delta=Delta("assistant", ""), logprobs=None, finish_reason=None)
            chunks.append(self._chunk([role], self._usage, UNSET if self._begun else self._ids(prompt)))
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

    def whole(self, outputs: Sequence[tuple[list[int], Increment]], usage: Usage) -> Struct:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(gained.text),
                logprobs=self._told(gained) if self._logprobs else None,
                finish_reason=gained.finish,
                stop_reason=gained.stop_reason,
                token_ids=self._ids(gained.tokens),
            )
            for index, (_, gained) in enumerate(outputs)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=self._ids(outputs[0][0]),
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


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
