"""From a checked request to a job: tokenize, and check all that needs the model to be known."""

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from cluster.protocol import SamplingParams
from router.choice import Reading
from router.detokenizer import Detokenizer
from router.errors import ApiError, bad_request
from router.generation import Generation
from router.offload import offloaded
from router.prompt import Prompt, echoed
from router.run import Job
from router.schemas import (
    MAX_TOKENIZED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from router.tokenizer import Tokenizer

_NOT_WITH_BEAMS = (
    *("stop", "logit_bias", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_BEAMS_ONLY = ("length_penalty", "early_stopping")

GREEDY_BELOW = 1e-5
"""Temperatures that fp32 logits can't be divided by are taken for 0."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""

MAX_TOLD = 2**20
"""Log-probabilities of prompt tokens that one parameter may ask for, alternatives and copies for all choices included: about 60 MB
of JSON and a second or two of work. Enough for a prompt of 49,932 tokens with 20 alternatives, or for 256 of 2,048 with one."""


@dataclass(frozen=True)
class ServedModel:
    """The one model that the cluster serves, as far as requests have to fit it."""

    name: str
    max_model_len: int
    """Longest sequence in tokens, prompt and output together, as far as the model is concerned; pools may hold less."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    """From the model's configuration; the tokenizer's own is added."""
    timeout_s: float = 600.0
    """How long a request may take."""
    root: str = ""
    """What the model was loaded from, as /v1/models tells it."""
    max_beams: int = 64
    """The widest beam search that an engine can run; 0: none at all."""
    apart_by_key: bool = False
    """Cached prefixes are shared only among requests of one API key."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""


class Preparer:
    """Makes jobs of requests. Raises ApiError for what cannot be served."""

    def __init__(self, model: ServedModel, tokenizer: Tokenizer, context: Callable[[], int]) -> None:
        """`context`: the longest sequence that can be served just now, in tokens."""
        self._model = model
        self._context = context
        self._tokenizer = tokenizer
        eos = {*model.eos_token_ids, *(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))}
        self._eos = tuple(sorted(eos))

    async def completion(self, request: CompletionRequest, request_id: str, authorization: str = "") -> Job:
        """The job of a /v1/completions request: one generation per prompt. `authorization`: the header's value."""
        self._check_model(request.model)
        prompts = await offloaded(sum(map(len, request.prompt)), self._prompts, request, self._context())
        salt = self._salt(request, authorization)
        return self._job(request, request_id, salt, prompts, "prompt", DEFAULT_COMPLETION_TOKENS, request.logprobs)

    def _prompts(self, request: CompletionRequest, limit: int) -> list[Prompt]:
        """What can't fit is refused before any of them is encoded, or read."""
        for asked in request.prompt:
            if isinstance(asked, str):
                self._check_length(asked, "prompt", limit)
            else:
                _check_fits(len(asked), "prompt", limit)
        prompts = [self._prompt(request, asked) for asked in request.prompt]
        for prompt in prompts:
            self._check_tokens(prompt.tokens, "prompt")
        return prompts

    def _prompt(self, request: CompletionRequest, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            if not request.echo:
                return Prompt(self._tokenizer.encode_now(prompt, request.add_special_tokens))
            tokens, offsets = self._tokenizer.located(prompt, request.add_special_tokens)
            return Prompt(tokens, prompt, offsets)
        if not request.echo:
            return Prompt(prompt)
        return echoed(self._tokenizer.vocabulary, prompt, show_special=not request.skip_special_tokens)

    async def chat(self, request: ChatRequest, request_id: str, authorization: str = "") -> Job:
        """The job of a /v1/chat/completions request. `authorization`: the header's value."""
        self._check_model(request.model)
        prompt = Prompt(await offloaded(_size(request.messages), self._spoken, request, self._context()))
        salt = self._salt(request, authorization)
        return self._job(request, request_id, salt, [prompt], "messages", None, request.alternatives)

    def _salt(self, request: GenerationRequest, authorization: str) -> str:
        """Of the cached prefixes. Keys themselves go no further than here."""
        if not self._model.apart_by_key:
            return request.cache_salt
        return f"{hashlib.sha256(authorization.encode()).hexdigest()}:{request.cache_salt}"

    def _spoken(self, request: ChatRequest, limit: int) -> list[int]:
        text = self._rendered(request.messages, request.add_generation_prompt, request.chat_template_kwargs)
        self._check_length(text, "messages", limit)
        return self._tokenizer.encode_now(text, add_special_tokens=False)

    async def tokens(self, request: TokenizeRequest) -> list[int]:
        """The answer to /tokenize. A text may be longer than the context: how much longer is what is asked."""
        self._check_model(request.model)
        size = _size(request.messages) if request.prompt is None else len(request.prompt)
        return await offloaded(size, self._tokens, request)

    def _tokens(self, request: TokenizeRequest) -> list[int]:
        if request.messages is None:
            assert request.prompt is not None
            return self._tokenizer.encode_now(request.prompt, request.add_special_tokens in (None, True))
        text = self._rendered(request.messages, request.add_generation_prompt, request.chat_template_kwargs)
        if len(text) > MAX_TOKENIZED:
            raise bad_request("messages", f"'messages' come to {len(text)} characters, but at most {MAX_TOKENIZED} are tokenized.")
        return self._tokenizer.encode_now(text, request.add_special_tokens is True)

    async def text(self, request: DetokenizeRequest) -> str:
        """The answer to /detokenize: special tokens show by their names."""
        self._check_model(request.model)
        self._check_tokens(request.tokens, "tokens")
        return await offloaded(len(request.tokens), self._text, request.tokens)

    def _text(self, tokens: list[int]) -> str:
        detokenizer = Detokenizer(self._tokenizer.vocabulary, show_special=True)
        return "".join(map(detokenizer.feed, tokens)) + detokenizer.flush()

    def _rendered(self, messages: list[Message], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        if not self._tokenizer.has_chat_template:
            raise bad_request("messages", "The model has no chat template; use /v1/completions.", "no_chat_template")
        try:
            return self._tokenizer.render([_plain(message) for message in messages], add_generation_prompt, variables)
        except ValueError as refusal:
            raise bad_request("messages", f"The chat template refuses these messages: {refusal}") from None

    def _job(
        self,
        request: GenerationRequest,
        request_id: str,
        cache_salt: str,
        prompts: list[Prompt],
        prompt_param: str,
        default_tokens: int | None,
        logprobs: int | None,
    ) -> Job:
        self._check_tokens(request.stop_token_ids, "stop_token_ids")
        self._check_tokens(request.logit_bias, "logit_bias")
        _check_beams(request, self._model.max_beams)
        _check_told(request, prompts)
        size_param, asked = request.output_size
        blamed = size_param if asked else prompt_param
        generations = [
            Generation(
                id=f"{request_id}-{number}",
                prompt=prompt.tokens,
                params=self._params(
                    request, self._max_tokens(len(prompt.tokens), prompt_param, size_param, asked, default_tokens), logprobs
                ),
                timeout_s=self._model.timeout_s,
                cache_salt=cache_salt,
            )
            for number, prompt in enumerate(prompts)
        ]
        reading = Reading(
            stops=request.stop,
            include_stop=request.include_stop_str_in_output,
            show_special=not request.skip_special_tokens,
            asked_stops=frozenset(request.stop_token_ids),
            echo=_echoes(request),
        )
        return Job(generations, prompts, reading, request.n if _ranks(request) else None, blamed)

    def _params(self, request: GenerationRequest, max_tokens: int, logprobs: int | None) -> SamplingParams:
        if request.min_tokens > max_tokens:
            raise bad_request("min_tokens", f"'min_tokens' is {request.min_tokens}, but at most {max_tokens} tokens are generated.")
        stops = dict.fromkeys((*request.stop_token_ids, *(() if request.ignore_eos else self._eos)))
        return SamplingParams(
            seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
            max_tokens=max_tokens,
            n=request.n if request.use_beam_search else request.choices,
            temperature=0.0 if request.temperature < GREEDY_BELOW else request.temperature,
            top_k=min(max(request.top_k, 0), self._model.vocab_size),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            logprobs=0 if logprobs is None and _ranks(request) else logprobs,
            stop_token_ids=tuple(stops),
            prompt_logprobs=max(_told(request).values(), default=None),
            min_tokens=request.min_tokens,
            beam_width=request.choices if request.use_beam_search else 0,
            length_penalty=request.length_penalty,
            early_stopping=request.early_stopping,
        )

    def _max_tokens(self, prompt: int, prompt_param: str, size_param: str, asked: int | None, default: int | None) -> int:
        limit = self._context()
        room = limit - prompt
        if prompt == 0:
            raise bad_request(prompt_param, f"'{prompt_param}' has no tokens.")
        _check_fits(prompt, prompt_param, limit, output=0 if asked == 0 else 1)
        if asked is not None and asked > room:
            raise _too_long(size_param, limit, f"{asked} tokens of output were asked for on top of {prompt} of prompt")
        if asked is not None:
            return asked
        return room if default is None else min(default, room)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise unknown_model(name)

    def _check_length(self, text: str, param: str, limit: int) -> None:
        """Refuse what can't fit before it is encoded: that takes more than a second a megabyte."""
        if (fewest := self._tokenizer.fewest_tokens(text)) > limit:
            raise _too_long(param, limit, f"the prompt has at least {fewest} tokens")

    def _check_tokens(self, tokens: "list[int] | dict[int, float]", param: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._model.vocab_size):
            wrong = next(token for token in tokens if not 0 <= token < self._model.vocab_size)
            raise bad_request(param, f"'{param}' has token id {wrong}, but ids go from 0 to {self._model.vocab_size - 1}.")


def unknown_model(name: str) -> ApiError:
    """404 for a model that is not served."""
    return ApiError(404, f"The model '{name}' does not exist.", param="model", code="model_not_found")


def new_id(prefix: str) -> str:
    """A cluster-wide unique request id, as clients see it."""
    return f"{prefix}-{uuid4().hex}"


def _plain(message: Message) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return turn if message.name is None else {**turn, "name": message.name}


def _echoes(request: GenerationRequest) -> bool:
    return isinstance(request, CompletionRequest) and request.echo


def _ranks(request: GenerationRequest) -> bool:
    """The answer's choices are ordered by their log-probabilities."""
    return request.choices > 1 and request.best_of is not None and not request.use_beam_search


def _check_beams(request: GenerationRequest, most: int) -> None:
    """A search takes the model's own log-probabilities as they are, draws nothing, and ends outputs by tokens alone."""
    beams, fields = request.use_beam_search, type(request).model_fields
    for param in _NOT_WITH_BEAMS if beams else _BEAMS_ONLY:
        if getattr(request, param) != fields[param].default and (param, getattr(request, param)) != ("top_k", -1):
            raise bad_request(param, f"'{param}' is {'not available' if beams else 'only allowed'} when 'use_beam_search' is true.")
    if beams and request.temperature not in (0.0, 1.0):
        raise bad_request("temperature", "'temperature' must be 0 or 1 when 'use_beam_search' is true: a search draws nothing.")
    if beams and most == 0:
        raise bad_request("use_beam_search", "'use_beam_search' needs engines with batching 'continuous' and reservation 'paged'.")
    if beams and request.choices > most:
        param = "n" if request.best_of is None else "best_of"
        raise bad_request(param, f"'{param}' is {request.choices}, but at most {most} beams can be searched at once here.")
    param, size = request.output_size
    if beams and size == 0:
        raise bad_request(param, f"'{param}' must be at least 1 when 'use_beam_search' is true.")


def _told(request: GenerationRequest) -> dict[str, int]:
    """The parameters that ask for log-probabilities of the prompt, and for how many likeliest tokens at each position."""
    asked = {"prompt_logprobs": request.prompt_logprobs}
    if isinstance(request, CompletionRequest) and request.echo:
        asked["logprobs"] = request.logprobs
    return {param: count for param, count in asked.items() if count is not None}


def _check_told(request: GenerationRequest, prompts: list[Prompt]) -> None:
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    copies = request.n if isinstance(request, CompletionRequest) else 1
    for param, count in _told(request).items():
        if (entries := tokens * copies * (count + 1)) > MAX_TOLD:
            what = f"{tokens} prompt tokens with {count} alternatives" + (f" for each of {copies} choices" if copies > 1 else "")
            raise bad_request(param, f"'{param}': {what} are {entries} log-probabilities, but an answer tells at most {MAX_TOLD}.")


def _size(messages: list[Message] | None) -> int:
    """Characters, the template's among them."""
    return sum(len(message.content) + 16 for message in messages or ())


def _check_fits(tokens: int, param: str, limit: int, output: int = 0) -> None:
    """Refuse a prompt that leaves fewer than `output` tokens of the context."""
    if tokens + output > limit:
        raise _too_long(param, limit, f"the prompt has {tokens} tokens, which leaves none for the output")


def _too_long(param: str, limit: int, what: str) -> ApiError:
    message = f"'{param}': the model's context is {limit} tokens, but {what}."
    return bad_request(param, message, "context_length_exceeded")
