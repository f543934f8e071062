"""The whole engine in one process, without Ray: for notebooks, benchmarks and machines that serve nobody.

The Batcher, the KV manager and the model runner are those of the cluster; only the messages between them are plain calls.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cluster.batcher import Batcher
from cluster.config import Config, batch_settings, from_mapping
from cluster.model import open_model
from cluster.protocol import EngineStats, FinishReason, Request, SamplingParams, TokenLogprobs
from cluster.structs import replace
from kv.manager import KVManager
from router.choice import Choice, Reading
from router.generation import ChoiceDelta, Speculation
from router.tokenizer import Tokenizer, load
from workers.local import LocalRanks
from workers.runner import ModelRunner

Prompt = str | Sequence[int]
"""Text or token ids."""
DEFAULT_PARAMS = SamplingParams()


@dataclass
class Output:
    """One choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class Completion:
    """All choices of one prompt."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Output]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Per prompt token, where the params ask for them; None for the first, which follows nothing."""
    speculative: Speculation | None = None
    """What speculation did for it, where it is on."""


@dataclass(frozen=True)
class Progress:
    """Text that one iteration added to one choice of one prompt."""

    prompt: int
    choice: int
    text: str


class LLM:
    """A loaded model.

    llm = LLM("path/to/model", max_model_len=2048)
    for completion in llm.generate(["def main"], SamplingParams(temperature=0.0, max_tokens=32)):
        print(completion.outputs[0].text)
    """

    def __init__(self, model: str, *, progress: bool = False, **settings: Any) -> None:
        """Load `model` (a directory or hub id). `settings` are those of cluster.config.Config by name. Raises ConfigError."""
        self.config: Config = from_mapping({"model": model, **settings})
        files = open_model(model, self.config.revision)
        self._eos = files.eos_token_ids
        self.vocab_size = files.shape.vocab_size
        self.tokenizer: Tokenizer = load(files.path)
        self.ranks = LocalRanks(files, self.config, progress=progress)
        batch = batch_settings(self.config, self.ranks.num_blocks, self.ranks.max_model_len, self.ranks.host_blocks)
        batch = dataclasses.replace(batch, run_ahead="off")  # launching is computing here: nobody waits meanwhile
        self.batcher = Batcher(batch, KVManager(batch))
        self._requests = 0

    @property
    def runner(self) -> ModelRunner:
        """The model runner; of a divided model that of rank 0."""
        return self.ranks.runners[0]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> list[Completion]:
        """Complete all prompts (texts or token ids), batched together; results in the order of the prompts.

        params: one for all or one for each. stop: strings that end a choice; include_stop: they belong to its text, and so do stop
        tokens, of which special ones show unless skip_special_tokens. Raises ValueError for a prompt that is empty, too long, or
        has ids out of range; then none is run.
        """
        reading = Reading(tuple(stop), include_stop=include_stop, show_special=not skip_special_tokens)
        run = _Run(self, prompts, params, reading, ignore_eos)
        for _ in run.steps():
            pass
        return run.completions

    def stream(self, prompt: Prompt, params: SamplingParams = DEFAULT_PARAMS, *, stop: Sequence[str] = ()) -> Iterator[Progress]:
        """Complete one prompt, text by text as it comes. Closing the iterator ends the generation."""
        yield from _Run(self, [prompt], params, Reading(tuple(stop)), ignore_eos=False).steps()

    def close(self) -> None:
        """End a divided model's ranks; nothing can be generated afterwards. An LLM that is forgotten ends them too."""
        self.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> EngineStats:
        """Gauges of the engine."""
        return self.batcher.stats()

    def next_id(self) -> str:
        """An id for a request."""
        self._requests += 1
        return str(self._requests)

    def prepared(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises ValueError."""
        ids = self.tokenizer.encode_now(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("a prompt is empty")
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is out of range: the vocabulary has {self.vocab_size}")
        return ids

    def with_eos(self, params: SamplingParams) -> SamplingParams:
        """`params` with the model's end-of-sequence ids among the stop tokens."""
        return replace(params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *self._eos))))


class _Run:
    """Some prompts on their way through the engine."""

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        reading: Reading,
        ignore_eos: bool,
    ) -> None:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} params")
        self._llm = llm
        self.completions: list[Completion] = []
        self._choices: dict[tuple[str, int], tuple[int, Choice]] = {}
        requests: list[Request] = []
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            if own.beam_width and reading.stops:
                raise ValueError(f"prompt {number}: a beam search has no stop strings, only stop tokens")
            own = own if ignore_eos else llm.with_eos(own)
            request = _request(llm.next_id(), llm.prepared(prompt), own)
            impossible = llm.batcher.why_impossible(request)
            if impossible is not None:
                raise ValueError(f"prompt {number}: {impossible}")
            requests.append(request)
            text = prompt if isinstance(prompt, str) else None
            told: list[TokenLogprobs | None] | None = None if own.prompt_logprobs is None else [None]
            self.completions.append(Completion(text, request.prompt, [Output() for _ in range(own.n)], told))
            for choice in range(own.n):
                reader = Choice(llm.tokenizer.vocabulary, request.prompt, own, reading)
                self._choices[request.id, choice] = (number, reader)
        self._requests = requests

    def steps(self) -> Iterator[Progress]:
        """Run iterations until all is done. Leaves nothing in the engine, however it ends."""
        batcher, ranks = self._llm.batcher, self._llm.ranks
        now = time.monotonic()
        for request in self._requests:
            batcher.add(request, now)
        try:
            while self._choices:
                while batcher.wants_plan and (plan := batcher.schedule(time.monotonic())) is not None:
                    ranks.launch(plan)
                assert batcher.in_flight, "requests wait, but nothing can run"
                result = ranks.collect()
                assert batcher.expects(result), "not the result of the oldest plan"
                for delta in batcher.update(result):
                    choice_delta = ChoiceDelta(
                        delta.choice,
                        delta.tokens,
                        delta.logprobs,
                        delta.finish,
                        prompt_logprobs=delta.prompt_logprobs,
                        verified=delta.verified,
                    )
                    number, text = self._feed(delta.request, choice_delta)
                    if text:
                        yield Progress(number, delta.choice, text)
        finally:
            for id, choice in list(self._choices):
                batcher.cancel(id, [choice])
            while batcher.in_flight and ranks.usable:
                batcher.update(ranks.collect())

    def _feed(self, request: str, delta: ChoiceDelta) -> tuple[int, str]:
        number, reader = self._choices[request, delta.choice]
        completion = self.completions[number]
        if completion.prompt_logprobs is not None:
            completion.prompt_logprobs += delta.prompt_logprobs
        if delta.verified is not None:
            completion.speculative = completion.speculative or Speculation()
            completion.speculative.add(*delta.verified)
        reader.feed(delta)
        gained = reader.take()
        output = completion.outputs[delta.choice]
        output.text += gained.text
        output.token_ids += gained.tokens
        output.logprobs += gained.logprobs
        if reader.finish is not None:
            output.finish_reason = reader.finish
            del self._choices[request, delta.choice]
            if delta.finish is None:
                self._llm.batcher.cancel(request, [delta.choice])
        return number, gained.text


def _request(id: str, prompt: list[int], params: SamplingParams) -> Request:
    return Request(
        id=id,
        attempt=0,
        reply_to="",
        prompt=prompt,
        emitted=[[] for _ in range(params.n)],
        finished=[False] * params.n,
        params=params,
    )
