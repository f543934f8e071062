"""What clients may send, checked by pydantic: OpenAI's fields, and those of vLLM's additions that Rayline serves.

A field is served, harmless (accepted without effect), refused (known, but not served: any value that would change the output is an
error) or unknown (an error). `null` means the default everywhere.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from router.errors import ApiError, bad_request

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_OUTPUTS = 1024
"""Choices of all prompts of a request together."""
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_TOKENIZED = 2**20
"""Characters that /tokenize takes, and tokens that /detokenize takes: about a second of work."""
MAX_LENGTH_PENALTY = 10.0
MAX_REPETITION = 10.0
"""A tenth of a logit, or ten times as much, already all but forces or forbids a token; far beyond, logits overflow fp32
to infinities, of which softmax makes no numbers."""

Prompts = list[str] | list[list[int]]
_Body = TypeVar("_Body", bound=BaseModel)


def _invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _refused(*neutral: Any) -> AfterValidator:
    """A field that Rayline does not serve: only null and the values without effect pass."""

    def check(value: Any) -> None:
        if value is not None and not any(type(value) is type(known) and value == known for known in neutral):
            raise PydanticCustomError("unsupported_parameter", "is not supported")

    return AfterValidator(check)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> Prompts:
    """One or many prompts, as text or as token ids."""
    many = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if all(isinstance(prompt, str) for prompt in many) or all(_is_ids(prompt) for prompt in many):
        if len(many) > MAX_PROMPTS:
            raise _invalid(f"at most {MAX_PROMPTS} prompts are served at once, but there are {len(many)}")
        if not all(many):
            raise _invalid("must not be empty")
        return many
    raise PydanticCustomError("invalid_type", "must be a string, a list of strings, a list of token ids or a list of such lists")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("invalid_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _invalid(f"at most {MAX_STOPS} stop strings are served, but there are {len(stops)}")
    if not all(stops):
        raise _invalid("must not contain an empty string")
    return tuple(dict.fromkeys(stops))


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(type(bias) in (int, float) for bias in value.values()):
        raise PydanticCustomError("invalid_type", "must map token ids to numbers")
    if len(value) > MAX_BIASES:
        raise _invalid(f"at most {MAX_BIASES} tokens can be biased, but there are {len(value)}")
    if not all(isinstance(token, int) or (token.isascii() and token.isdigit()) for token in value):
        raise _invalid("must have token ids as keys")
    if not all(-100 <= bias <= 100 for bias in value.values()):
        raise _invalid("must have values between -100 and 100")
    return {int(token): float(bias) for token, bias in value.items()}


def _content(value: Any) -> str:
    """A message's text: a string, or a list of text parts, which are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "unsupported_parameter", "has a part of type {kind}; only text is supported", {"kind": repr(kind)}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("invalid_type", "has a text part without text")
        texts.append(part["text"])
    return "\n".join(texts)


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Harmless: padding against observers of packet sizes, which is not added."""


class GenerationRequest(_Strict):
    """What both endpoints share."""

    model: str | None = None
    """The served model's name; there is only one, so it may be left out."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """So many choices are generated; the `n` with the highest mean log-probability per token are the answer, best first. Of a beam
    search it is the width."""
    use_beam_search: bool = False
    """Search for the `n` likeliest outputs, with `best_of` (else `n`) beams, instead of drawing tokens; best first."""
    length_penalty: float = Field(1.0, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    """Of a beam search: outputs are ranked by their log-probability over length ** length_penalty."""
    early_stopping: bool = False
    """Of a beam search: end it as soon as there are as many outputs as beams."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    """0 and -1: off."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1 / MAX_REPETITION, le=MAX_REPETITION)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=0)
    """0 where only the prompt is asked about (prompt_logprobs, echo)."""
    min_tokens: int = Field(0, ge=0)
    """Neither a stop token nor a stop string ends a choice before so many tokens."""
    stop: Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(_STOP_SCHEMA)] = ()
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    cache_salt: str = ""

    # Harmless: they say who asks and how it is billed or stored.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    # Refused.
    spaces_between_special_tokens: Annotated[Any, _refused(True)] = None
    truncate_prompt_tokens: Annotated[Any, _refused()] = None
    return_tokens_as_token_ids: Annotated[Any, _refused(False)] = None
    response_format: Annotated[Any, _refused({"type": "text"})] = None
    structured_outputs: Annotated[Any, _refused()] = None
    guided_json: Annotated[Any, _refused()] = None
    guided_regex: Annotated[Any, _refused()] = None
    guided_choice: Annotated[Any, _refused()] = None
    guided_grammar: Annotated[Any, _refused()] = None
    logits_processors: Annotated[Any, _refused([])] = None
    priority: Annotated[Any, _refused(0)] = None

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _of("stream_options", "is only allowed when 'stream' is true")
        if self.best_of is not None and self.best_of < self.n:
            raise _of("best_of", "must be at least 'n'")
        if self.best_of is not None and self.best_of > 1 and self.stream and not self.use_beam_search:
            raise _of("best_of", "is not available when 'stream' is true: which choices are best is known at the end")
        if self.prompt_logprobs is not None and self.stream:
            raise _of("prompt_logprobs", "is not available when 'stream' is true")
        param, size = self.output_size
        if size == 0 and not self.about_prompt:
            raise _of(param, "must be at least 1 where nothing is asked about the prompt")
        return self

    @property
    def output_size(self) -> tuple[str, int | None]:
        """The parameter that says how many tokens are generated at most, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def about_prompt(self) -> bool:
        """The answer tells of the prompt, so that it may be without output."""
        return self.prompt_logprobs is not None

    @property
    def choices(self) -> int:
        """How many are generated for each prompt, or are searched at once."""
        return self.n if self.best_of is None else self.best_of

    @property
    def include_usage(self) -> bool:
        """The stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True
    """Let the tokenizer put its special tokens around a text prompt."""
    echo: bool = False
    """The prompt's text before the output's, its tokens' log-probabilities before the output's."""
    suffix: Annotated[Any, _refused("")] = None
    prompt_embeds: Annotated[Any, _refused()] = None

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        if len(self.prompt) * self.choices > MAX_OUTPUTS:
            param = "n" if self.best_of is None else "best_of"
            raise _of(param, f"times the number of prompts is more than {MAX_OUTPUTS}")
        return self

    @property
    def about_prompt(self) -> bool:
        """The answer tells of the prompt, so that it may be without output."""
        return self.echo or self.prompt_logprobs is not None


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
    name: str | None = None

    # As clients send answers back: all null unless the assistant did what is refused here.
    refusal: Annotated[Any, _refused()] = None
    audio: Annotated[Any, _refused()] = None
    annotations: Annotated[Any, _refused([])] = None
    tool_calls: Annotated[Any, _refused([])] = None
    function_call: Annotated[Any, _refused()] = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    """The newer name of max_tokens; wins over it."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template (enable_thinking, say)."""
    add_generation_prompt: bool = True

    parallel_tool_calls: Any = None
    prediction: Any = None

    tools: Annotated[Any, _refused([])] = None
    tool_choice: Annotated[Any, _refused("none", "auto")] = None
    functions: Annotated[Any, _refused([])] = None
    function_call: Annotated[Any, _refused("none", "auto")] = None
    modalities: Annotated[Any, _refused(["text"])] = None
    audio: Annotated[Any, _refused()] = None
    reasoning_effort: Annotated[Any, _refused()] = None
    verbosity: Annotated[Any, _refused()] = None
    web_search_options: Annotated[Any, _refused()] = None
    moderation: Annotated[Any, _refused()] = None
    echo: Annotated[Any, _refused(False)] = None
    chat_template: Annotated[Any, _refused()] = None
    continue_final_message: Annotated[Any, _refused(False)] = None
    add_special_tokens: Annotated[Any, _refused(False)] = None
    documents: Annotated[Any, _refused([])] = None

    @model_validator(mode="after")
    def _logprobs_asked(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _of("top_logprobs", "is only allowed when 'logprobs' is true")
        return self

    @property
    def output_size(self) -> tuple[str, int | None]:
        """The parameter that says how many tokens are generated at most, and what it says."""
        return super().output_size if self.max_completion_tokens is None else ("max_completion_tokens", self.max_completion_tokens)

    @property
    def alternatives(self) -> int | None:
        """So many likeliest tokens are told with each token of the output; None: not even its own log-probability."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(_Strict):
    """POST /tokenize: a text, or messages as the chat template writes them."""

    model: str | None = None
    prompt: str | None = Field(None, max_length=MAX_TOKENIZED)
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    """Default: with a prompt, but not with messages: templates spell their special tokens out."""
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False

    chat_template: Annotated[Any, _refused()] = None
    continue_final_message: Annotated[Any, _refused(False)] = None
    tools: Annotated[Any, _refused([])] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise _of("prompt", "or 'messages' is required, and not both")
        return self


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENIZED)


def _of(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("inconsistent", "{reason}", {"reason": message, "param": param})


def parse(schema: type[_Body], body: bytes) -> _Body:
    """The body of a request, checked. Raises ApiError (400), which names the first parameter that is wrong."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)) from None


def check(schema: type[_Body], values: dict[str, Any]) -> _Body:
    """As parse(), of values that came in another form than JSON."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False)) from None


_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
}
_REASONS = {"extra_forbidden": "is not known", "missing": "is required"}


def _explained(errors: Sequence[ErrorDetails]) -> ApiError:
    # An unknown name may be a typing error of a known one: what is wrong with that matters less.
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    kind, location = error["type"], error["loc"]
    param = error.get("ctx", {}).get("param") or "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    if kind == "json_invalid":
        return bad_request(None, f"The body is not valid JSON: {error['ctx']['error']}.", "invalid_json")
    if not param:
        return bad_request(None, "The body must be a JSON object.", "invalid_type")
    reason = _REASONS.get(kind) or re.sub("^(Input|List|String) should", "must", error["msg"])
    code = _CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value")
    return bad_request(param, f"'{param}' {reason}.", code)
