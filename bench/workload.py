"""What is asked of the engines: synthetic shapes or a trace's, scaled, fitted to a model, and given token ids and arrivals.

A shape is lengths and a time; a job is a shape with token ids. Shapes come from a seed or from a file in one of two formats:

    Azure LLM inference trace (CSV)   TIMESTAMP,ContextTokens,GeneratedTokens
    Mooncake trace (JSON lines)       {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [one per 512 tokens]}
"""

import csv
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

SEED = 1234
BLOCK_TOKENS = 512
"""Prompt tokens that one hash id of a Mooncake trace stands for."""
_PLAIN_ID = 300
"""Special tokens and single bytes are below, in the vocabularies of bench.models and of the demo."""
_AZURE = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}

Value = TypeVar("Value")


class TraceError(ValueError):
    """A trace that can't be read: file, line and reason in one line."""


@dataclass(frozen=True)
class Shape:
    """Lengths of one request."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    """Since the first request."""
    blocks: tuple[int, ...] = ()
    """Of the prompt from its start, `block_tokens` each: equal numbers are equal tokens. What they don't cover is its own."""
    block_tokens: int = BLOCK_TOKENS

    @property
    def total(self) -> int:
        """Prompt and output."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Job:
    """One request with its tokens."""

    prompt: list[int]
    output_tokens: int
    """It ends with so many."""
    arrival_s: float = 0.0
    max_tokens: int | None = None
    """What the client asks for, at least output_tokens; None: just that."""

    @property
    def asked(self) -> int:
        """max_tokens as the engine is told."""
        return self.output_tokens if self.max_tokens is None else self.max_tokens


# --- sources --------------------------------------------------------------------------------------------------------


def uniform_shapes(requests: int = 64) -> list[Shape]:
    """Prompts of 32 to 256 tokens and outputs of 16 to 128, all at once; always the same."""
    drawn = random.Random(SEED)
    return [Shape(drawn.randint(32, 256), drawn.randint(16, 128)) for _ in range(requests)]


def lognormal_shapes(requests: int, seed: int = SEED) -> list[Shape]:
    """Lengths as skewed as those of real chats, all at once: log-normal, prompts with median 512 and sigma 1, outputs with median
    128 and sigma 0.8 (the Azure conversation trace of 2023 has medians 1020 and 129, and its outputs 395 at the third quartile)."""
    drawn = np.random.default_rng(seed)
    prompts, outputs = drawn.lognormal(np.log(512), 1.0, requests), drawn.lognormal(np.log(128), 0.8, requests)
    return [Shape(max(1, round(p)), max(1, round(o))) for p, o in zip(prompts.tolist(), outputs.tolist(), strict=True)]


def read_trace(path: Path, limit: int | None = None) -> list[Shape]:
    """The first `limit` requests of a trace (default: all) in order of arrival. Its format is told by its first line, not by its
    name. Raises TraceError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                shapes = _read(path, enumerate(file, 1), _mooncake, limit)
            elif {name.strip() for name in first.lstrip("\ufeff").split(",")} >= _AZURE:
                rows = csv.DictReader(itertools.chain([first.lstrip("\ufeff")], itertools.islice(file, 1, None)))
                shapes = _read(path, ((rows.line_num, row) for row in rows), _azure, limit)
            else:
                wanted = "'TIMESTAMP,ContextTokens,GeneratedTokens' (Azure) or a JSON object (Mooncake)"
                raise TraceError(f"{path}:1: neither {wanted}: {first.strip()[:60]!r}")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not shapes:
        raise TraceError(f"{path}: no requests in it")
    start = min(shape.arrival_s for shape in shapes)
    moved = [dataclasses.replace(shape, arrival_s=shape.arrival_s - start) for shape in shapes]
    return sorted(moved, key=lambda shape: shape.arrival_s)


def _read(path: Path, rows: Iterable[tuple[int, Value]], parse: Callable[[Value], Shape | None], limit: int | None) -> list[Shape]:
    shapes: list[Shape] = []
    for number, row in rows:
        if limit is not None and len(shapes) >= limit:
            break
        try:
            shape = parse(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise TraceError(f"{path}:{number}: {reason}") from error
        if shape is not None:
            shapes.append(shape)
    return shapes


def _azure(row: dict[str, str]) -> Shape:
    time = datetime.fromisoformat(row["TIMESTAMP"].strip())
    return Shape(
        _tokens("ContextTokens", int(row["ContextTokens"])),
        _tokens("GeneratedTokens", int(row["GeneratedTokens"])),
        (time - datetime(1970, 1, 1, tzinfo=time.tzinfo)).total_seconds(),
    )


def _mooncake(line: str) -> Shape | None:
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return Shape(
        _tokens("input_length", row["input_length"]),
        _tokens("output_length", row["output_length"]),
        float(row["timestamp"]) / 1000,
        tuple(int(id) for id in row["hash_ids"]),
    )


def _tokens(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be a number of at least 1")
    return value


# --- fitting --------------------------------------------------------------------------------------------------------


def scaled(shapes: Sequence[Shape], prompt: float, output: float, prompt_tokens: int | None = None) -> list[Shape]:
    """Lengths times a factor, rounded, at least 1; or all prompts `prompt_tokens` long. Shared blocks shrink with the prompts."""
    return [
        dataclasses.replace(
            shape,
            prompt_tokens=prompt_tokens or max(1, round(shape.prompt_tokens * prompt)),
            output_tokens=max(1, round(shape.output_tokens * output)),
            block_tokens=max(1, round(shape.block_tokens * prompt)),
        )
        for shape in shapes
    ]


def dropped(shapes: Sequence[Shape], max_model_len: int) -> list[Shape]:
    """Without requests longer than `max_model_len`: what a server does, which refuses them."""
    return [shape for shape in shapes if shape.total <= max_model_len]


def clipped(shapes: Sequence[Shape], max_model_len: int) -> list[Shape]:
    """Longer requests cut to `max_model_len`: the output to what leaves one prompt token, then the prompt."""
    fitting = []
    for shape in shapes:
        output = min(shape.output_tokens, max_model_len - 1)
        prompt = min(shape.prompt_tokens, max_model_len - output)
        fitting.append(dataclasses.replace(shape, prompt_tokens=prompt, output_tokens=output))
    return fitting


def at_once(shapes: Sequence[Shape]) -> list[Shape]:
    """The same requests, all there from the start."""
    return [dataclasses.replace(shape, arrival_s=0.0) for shape in shapes]


def poisson(jobs: Sequence[Job], rate: float, seed: int) -> list[Job]:
    """The same requests arriving as a Poisson process of `rate` a second, the first at 0.

    One seed gives the same gaps at every rate, stretched, so that a curve over rates has no noise from the arrivals.
    """
    gaps = np.random.default_rng(seed).exponential(1.0, len(jobs))
    times = (np.cumsum(gaps) - gaps[:1]) / rate
    return [dataclasses.replace(job, arrival_s=time) for job, time in zip(jobs, times.tolist(), strict=True)]


# --- token ids ------------------------------------------------------------------------------------------------------


def jobs(shapes: Sequence[Shape], vocab_size: int, salt: int = 0) -> list[Job]:
    """Token ids for all shapes: plain entries of a vocabulary of `vocab_size`. Another salt gives other tokens for the same shapes.
    Prompts begin with equal tokens exactly where their blocks' numbers are equal."""
    low = min(_PLAIN_ID, vocab_size // 2)
    return [Job(_prompt(shape, i, low, vocab_size, salt), shape.output_tokens, shape.arrival_s) for i, shape in enumerate(shapes)]


def _prompt(shape: Shape, index: int, low: int, high: int, salt: int) -> list[int]:
    def draw(count: int, kind: int, number: int) -> list[int]:
        ids: list[int] = np.random.default_rng((SEED, salt, kind, number)).integers(low, high, count).tolist()
        return ids

    tokens: list[int] = []
    for block in shape.blocks[: -(-shape.prompt_tokens // shape.block_tokens)]:
        tokens += draw(shape.block_tokens, 0, block)
    missing = shape.prompt_tokens - len(tokens)
    return tokens + draw(missing, 1, index) if missing > 0 else tokens[: shape.prompt_tokens]
