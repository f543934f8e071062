"""What the gRPC client takes and gives, and how it is written as the messages of inference.proto."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import grpc
from google.protobuf.message import Message

from router import inference_pb2 as pb

_FIELD = re.compile(r"([a-z_]\w*(?:\.\w+|\[\d+\])*): (.*)", re.DOTALL)
_BLAMING = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
"""Statuses whose details name a field."""
_FINISHES: dict[int, Literal["stop", "length"]] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class Turn(TypedDict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str
    name: NotRequired[str]


Prompt = str | Sequence[int] | Sequence[Turn]
"""A text, its token ids, or a chat."""


class Parameters(TypedDict, total=False):
    """The fields of GenerationRequest in inference.proto, which says what they mean; left out, or None, is the default."""

    model: str | None
    timeout_s: float | None
    """Of this call, in seconds; default: the client's."""
    n: int | None
    best_of: int | None
    """complete() only."""
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    """complete() only."""
    skip_special_tokens: bool | None
    add_special_tokens: bool | None
    """Not with a chat."""
    cache_salt: str | None
    use_beam_search: bool | None
    length_penalty: float | None
    early_stopping: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    """With a chat only, as the next."""
    add_generation_prompt: bool | None


class TokenizeParameters(TypedDict, total=False):
    """The fields of TokenizeRequest."""

    model: str | None
    timeout_s: float | None
    """Of this call, in seconds; default: the client's."""
    add_special_tokens: bool | None
    return_token_strs: bool | None
    chat_template_kwargs: Mapping[str, Any] | None
    """With a chat only, as the next."""
    add_generation_prompt: bool | None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution."""

    token_id: int
    token: bytes
    logprob: float
    rank: int | None = None
    """1 for the likeliest; of prompt tokens only."""


@dataclass(frozen=True)
class PositionLogprobs:
    """The token of one position, and the likeliest ones there."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


@dataclass(frozen=True)
class Speculation:
    """What speculation did for a request."""

    proposed_tokens: int
    """Those that were verified ..."""
    accepted_tokens: int
    """... and of these, the ones that stood."""
    steps: int
    """Iterations that verified some, counted for each output."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompt's, those whose KV was found in a cache."""
    speculative: Speculation | None = None
    """None where the server does not speculate."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One of n outputs."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    """With the parameter of that name, one for each token."""
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    """The stop text or the stop token of the request that ended it."""


@dataclass(frozen=True, kw_only=True)
class Event(Output):
    """What one of n outputs gained in a step; `text` may lag behind `token_ids`."""

    id: str
    usage: Usage | None
    """With the last event of a stream."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    id: str
    model: str
    outputs: list[Output]
    usage: Usage
    prompt_logprobs: list[PositionLogprobs]
    """With the parameter of that name: of the prompt's tokens from the second on."""

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text


@dataclass(frozen=True)
class Tokens:
    """What tokenize() answers."""

    token_ids: list[int]
    token_strs: list[str]
    """Where they were asked for."""
    max_model_len: int


@dataclass(frozen=True)
class Model:
    """A served model."""

    id: str
    root: str
    created: int
    """Unix time in seconds."""
    max_model_len: int
    """Tokens, prompt and output together."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One copy of the model."""

    name: str
    epoch: int
    ready: bool
    reason: str
    """Why it is not ready."""
    max_sequence_tokens: int
    running: int
    waiting: int
    blocks_total: int
    blocks_used: int


@dataclass(frozen=True)
class Status:
    """The cluster as its scheduler last told of it."""

    ready: bool
    reason: str
    """Why it is not ready."""
    engines: list[Engine]
    queued: int
    """Requests that wait for an engine."""


class RaylineError(Exception):
    """A call that ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        """The parameter to blame."""


@contextmanager
def explained() -> Iterator[None]:
    """A call's failure as RaylineError."""
    try:
        yield
    except grpc.RpcError as error:
        call: Any = error  # all that calls raise has both, though not by its base class
        code, details = call.code(), call.details() or ""
        named = _FIELD.fullmatch(details) if code in _BLAMING else None
        raise RaylineError(code, details, named[1] if named else None) from error


def generation_request(prompt: Prompt, parameters: Parameters, timeout_s: float | None) -> pb.GenerationRequest:
    """`timeout_s`: where `parameters` name none."""
    values: dict[str, Any] = {"timeout_s": timeout_s} | _set(parameters)
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    request = pb.GenerationRequest()
    if isinstance(prompt, str):
        _fill(request, text=prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(_chat(prompt, values))
    else:
        _fill(request, token_ids={"ids": prompt})
    _fill(request, **values)
    return request


def tokenize_request(prompt: str | Sequence[Turn], parameters: TokenizeParameters) -> pb.TokenizeRequest:
    """All but the time-out."""
    values = _set(parameters)
    values.pop("timeout_s", None)
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _fill(request, text=prompt)
    else:
        request.chat.CopyFrom(_chat(prompt, values))
    _fill(request, **values)
    return request


def _set(parameters: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _chat(turns: Sequence[Any], values: dict[str, Any]) -> pb.Chat:
    """Takes what belongs to a chat out of `values`."""
    chat = pb.Chat()
    _fill(chat, messages=[dict(turn) for turn in turns])
    for name in ("chat_template_kwargs", "add_generation_prompt"):
        if name in values:
            _fill(chat, **{name: values.pop(name)})
    return chat


def _fill(message: Message, **values: Any) -> None:
    """Set fields. Raises RaylineError, which names the one that can't be written."""
    for name, value in values.items():
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise RaylineError(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: {error}", name) from None


def events_of(response: pb.GenerateResponse) -> list[Event]:
    """One for each output that the step brought news of."""
    usage = _usage(response.usage) if response.HasField("usage") else None
    last = len(response.outputs) - 1
    return [
        Event(**_output(output), id=response.id, usage=usage if position == last else None)
        for position, output in enumerate(response.outputs)
    ]


def completion_of(response: pb.CompleteResponse) -> Completion:
    """The whole answer."""
    return Completion(
        id=response.id,
        model=response.model,
        outputs=[Output(**_output(output)) for output in response.outputs],
        usage=_usage(response.usage),
        prompt_logprobs=[_position(entry) for entry in response.prompt_logprobs],
    )


def tokens_of(response: pb.TokenizeResponse) -> Tokens:
    """What Tokenize answered."""
    return Tokens(list(response.token_ids), list(response.token_strs), response.max_model_len)


def models_of(response: pb.ListModelsResponse) -> list[Model]:
    """What ListModels answered."""
    return [Model(model.id, model.root, model.created, model.max_model_len) for model in response.models]


def status_of(response: pb.ClusterStatusResponse) -> Status:
    """What ClusterStatus answered."""
    engines = [
        Engine(
            name=engine.name,
            epoch=engine.epoch,
            ready=engine.ready,
            reason=engine.reason,
            max_sequence_tokens=engine.max_sequence_tokens,
            running=engine.running,
            waiting=engine.waiting,
            blocks_total=engine.blocks_total,
            blocks_used=engine.blocks_used,
        )
        for engine in response.engines
    ]
    return Status(response.ready, response.reason, engines, response.queued)


def _output(output: pb.Output) -> dict[str, Any]:
    stop = output.WhichOneof("stop_reason")
    return {
        "index": output.index,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "logprobs": [_position(entry) for entry in output.logprobs],
        "finish_reason": _FINISHES.get(output.finish_reason),
        "stop_reason": None if stop is None else getattr(output, stop),
    }


def _usage(usage: pb.Usage) -> Usage:
    told = usage.speculative
    speculative = Speculation(told.proposed_tokens, told.accepted_tokens, told.steps) if usage.HasField("speculative") else None
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, speculative)


def _position(entry: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(_token(entry.chosen), [_token(token) for token in entry.top])


def _token(token: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.token, token.logprob, token.rank if token.HasField("rank") else None)
