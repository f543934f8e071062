"""Between inference.proto's messages and what the router works with: the HTTP interface's requests, and increments of outputs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from google.protobuf.json_format import MessageToDict
from msgspec import UNSET

from cluster.protocol import ClusterStatus, TokenLogprobs
from router import inference_pb2 as pb
from router.choice import Increment
from router.errors import ApiError, bad_request
from router.prompt import Prompt
from router.responses import Health, Model
from router.run import Run
from router.schemas import ChatRequest, CompletionRequest, TokenizeRequest, check
from router.vocabulary import Vocabulary

MAX_DETAILS = 250
"""Characters of a status' details. They travel in headers of 8 KiB together: percent-encoded, at most 12 bytes a character, and
twice in base 64, at most 11."""

_FINISHES = {None: pb.FINISH_REASON_UNSPECIFIED, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_FIELDS = {"top_logprobs": "logprobs"}
"""Parameters of the HTTP interface whose field has another name."""


def generation_request(message: pb.GenerationRequest, *, streamed: bool) -> CompletionRequest | ChatRequest:
    """The HTTP request that asks for the same. Raises ApiError, which names the first field that is wrong."""
    if streamed and message.HasField("prompt_logprobs"):
        raise bad_request("prompt_logprobs", "'prompt_logprobs' is Complete's: a stream tells nothing of the prompt.")
    if streamed and message.best_of > 1 and not message.use_beam_search:
        raise bad_request("best_of", "'best_of' is Complete's: which outputs are best is known at the end.")
    values = _given(message)
    values.pop("timeout_s", None)
    if message.HasField("chat") and "logprobs" in values:
        values["logprobs"], values["top_logprobs"] = True, values["logprobs"]
    return check(ChatRequest, values) if message.HasField("chat") else check(CompletionRequest, values)


def tokenize_request(message: pb.TokenizeRequest) -> TokenizeRequest:
    """As generation_request()."""
    return check(TokenizeRequest, _given(message))


def timeout_of(message: pb.GenerationRequest, remaining_s: float | None, most_s: float) -> float:
    """Seconds that the generation may take: the least of what the field, the call's deadline and the server allow."""
    asked = message.timeout_s if message.HasField("timeout_s") else most_s
    if not asked > 0:  # nor is "not a number"
        raise bad_request("timeout_s", f"'timeout_s' must be above 0, but is {asked:g}.")
    return max(0.0, min(asked, most_s, math.inf if remaining_s is None else remaining_s))


def blamed(error: ApiError) -> tuple[str | None, str]:
    """The field to blame, and a status' details: that field, a colon and what is wrong with it; or only the latter."""
    field, text = error.param, str(error)
    if field is not None:
        reason = text.removeprefix(f"'{field}'").removeprefix(":").lstrip()
        field = _FIELDS.get(field, field)
        text = f"{field}: {reason}"
    return field, text if len(text) <= MAX_DETAILS else f"{text[: MAX_DETAILS - 4]} ..."


def _given(message: pb.GenerationRequest | pb.TokenizeRequest) -> dict[str, Any]:
    """The fields that were set, as HTTP has them."""
    values: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name, plain in (("stop", list), ("stop_token_ids", list), ("logit_bias", dict)):
        if name in values:
            values[name] = plain(values[name])
    match message.WhichOneof("prompt"):
        case "text":
            values["prompt"] = values.pop("text")
        case "token_ids":
            values["prompt"] = list(values.pop("token_ids").ids)
        case "chat":
            values |= _chat(values.pop("chat"))
        case _:
            raise bad_request("prompt", "'prompt' is required.", "missing_required_parameter")
    return values


def _chat(chat: pb.Chat) -> dict[str, Any]:
    values: dict[str, Any] = {
        "messages": [
            {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.HasField("name") else {})
            for turn in chat.messages
        ]
    }
    if chat.HasField("add_generation_prompt"):
        values["add_generation_prompt"] = chat.add_generation_prompt
    if chat.HasField("chat_template_kwargs"):
        values["chat_template_kwargs"] = _as_json(MessageToDict(chat.chat_template_kwargs))
    return values


def _as_json(value: Any) -> Any:
    """A Struct's value as it would be read from JSON, which knows whole numbers."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_as_json(item) for item in value]
        case dict():
            return {name: _as_json(item) for name, item in value.items()}
    return value


class Writer:
    """Writes what was generated."""

    def __init__(self, vocabulary: Vocabulary, logprobs: int | None, prompt_logprobs: int | None) -> None:
        """Each of the two: so many likeliest tokens with each token, or none, not even its own log-probability."""
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    def size(self, news: Iterable[tuple[int, Increment]]) -> int:
        """How many tokens and log-probabilities there are to write."""
        return sum(len(gained.tokens) for _, gained in news) * (1 if self._logprobs is None else 2 + self._logprobs)

    def step(self, id: str, news: Iterable[tuple[int, Increment]]) -> pb.GenerateResponse:
        """What a stream says of one step: no outputs where nothing is to be said."""
        told = [(index, gained) for index, gained in news if gained.tokens or gained.text or gained.finish]
        return pb.GenerateResponse(id=id, outputs=[self._output(index, gained) for index, gained in told])

    def whole(self, id: str, model: str, outputs: Sequence[tuple[Prompt, Increment]], usage: pb.Usage) -> pb.CompleteResponse:
        """The answer in one piece."""
        prompt = outputs[0][0]
        scores = [] if self._prompt_logprobs is None else zip(prompt.tokens[1:], prompt.scores, strict=True)
        return pb.CompleteResponse(
            id=id,
            model=model,
            outputs=[self._output(index, gained) for index, (_, gained) in enumerate(outputs)],
            usage=usage,
            prompt_logprobs=[self._position(token, entry, self._prompt_logprobs or 0) for token, entry in scores],
        )

    def _output(self, index: int, gained: Increment) -> pb.Output:
        logprobs = self._logprobs
        entries = [] if logprobs is None else zip(gained.tokens, gained.logprobs, strict=True)
        output = pb.Output(
            index=index,
            text=gained.text,
            token_ids=gained.tokens,
            logprobs=[self._position(token, entry, logprobs or 0) for token, entry in entries],
            finish_reason=_FINISHES[gained.finish],
        )
        if isinstance(gained.stop_reason, str):
            output.stop_text = gained.stop_reason
        elif gained.stop_reason is not None:
            output.stop_token_id = gained.stop_reason
        return output

    def _position(self, token: int, entry: TokenLogprobs, most: int) -> pb.PositionLogprobs:
        likeliest = zip(entry.top_ids[:most], entry.top_logprobs[:most], strict=True)
        return pb.PositionLogprobs(
            chosen=pb.TokenLogprob(
                token_id=token, token=self._vocabulary.token_bytes(token), logprob=entry.logprob, rank=entry.rank
            ),
            top=[
                pb.TokenLogprob(token_id=other, token=self._vocabulary.token_bytes(other), logprob=logprob)
                for other, logprob in likeliest
            ],
        )


def usage_of(run: Run) -> pb.Usage:
    """What was counted so far."""
    told = run.speculation
    return pb.Usage(
        prompt_tokens=run.prompt_tokens,
        completion_tokens=run.completion_tokens,
        cached_tokens=run.cached_tokens,
        speculative=None if told is None else pb.Speculation(**asdict(told)),
    )


def model_of(card: Model) -> pb.Model:
    """The model as ListModels tells it."""
    return pb.Model(id=card.id, root=card.root, created=card.created, max_model_len=card.max_model_len)


def status_of(status: ClusterStatus, health: Health) -> pb.ClusterStatusResponse:
    """The cluster as ClusterStatus tells it."""
    engines = [
        pb.Engine(
            name=engine.engine,
            epoch=engine.epoch,
            ready=engine.ready,
            reason=engine.reason,
            max_sequence_tokens=engine.max_sequence_tokens,
            running=engine.stats.running,
            waiting=engine.stats.waiting,
            blocks_total=engine.stats.blocks_total,
            blocks_used=engine.stats.blocks_used,
        )
        for engine in status.engines
    ]
    reason = "" if health.reason is UNSET else health.reason
    return pb.ClusterStatusResponse(ready=health.status == "ok", reason=reason, engines=engines, queued=status.queued)
