"""The wire shapes of OpenAI's answers, as msgspec structs: the SSE hot path encodes one of them per choice and step."""

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from router.generation import Speculation

Finish = Literal["stop", "length"]
TokenIds = list[int] | UnsetType
"""Present only where the request set return_token_ids."""


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = Raw | UnsetType
"""A list as vLLM tells it: per prompt token its own entry (token id -> PromptLogprob), then those of the likeliest ones; null for
the first token. Present only where the request set prompt_logprobs. It is long, so it is written once for all choices."""


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    speculative: Speculation | UnsetType = UNSET
    """Present only where speculation is on."""


class CompletionLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    prompt_token_ids: TokenIds = UNSET
    token_ids: TokenIds = UNSET
    prompt_logprobs: PromptLogprobs = UNSET


class Completion(Struct, kw_only=True):
    """An answer of /v1/completions, and a chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice] | list[Raw]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatLogprob]
    refusal: None = None


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: TokenIds = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: TokenIds = UNSET


class ChatMessage(Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: TokenIds = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice] | list[Raw]
    usage: Usage
    prompt_token_ids: TokenIds = UNSET
    prompt_logprobs: PromptLogprobs = UNSET


class Model(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "rayline"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class Tokenized(Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    prompt: str


class Version(Struct):
    version: str


class Health(Struct, kw_only=True):
    status: Literal["ok", "unavailable"]
    reason: str | UnsetType = UNSET
    engines: dict[str, Any]
    """How many there are, and how many are ready."""
