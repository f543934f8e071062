"""Command-line options that the benchmarks share, and the workload they describe."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.workload import SEED, Shape, clipped, dropped, lognormal_shapes, read_trace, scaled

OUTPUT = Path("build/bench")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the module's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=OUTPUT, metavar="DIR", help="where JSON and PNG go (default: %(default)s)")
    return made


def add_workload(to: argparse.ArgumentParser, *, requests: int, prompt_scale: float, output_scale: float) -> None:
    """Options of the workload, with a benchmark's own defaults."""
    to.add_argument("--trace", type=Path, metavar="FILE", help="Azure CSV or Mooncake JSONL (default: log-normal lengths)")
    to.add_argument("--requests", type=number, default=requests, help="the first so many; 0: all (default: %(default)s)")
    to.add_argument("--spread", action="store_true", help="not the first so many, but as many evenly spread over the trace")
    to.add_argument("--prompt-scale", type=factor, default=prompt_scale, help="prompt lengths times this (default: %(default)s)")
    to.add_argument("--output-scale", type=factor, default=output_scale, help="output lengths times this (default: %(default)s)")
    to.add_argument("--prompt-tokens", type=positive, help="all prompts of this length instead")
    to.add_argument("--too-long", choices=["drop", "clip"], default="drop", help="requests beyond the model's length")


def workload(arguments: argparse.Namespace, max_model_len: int, say: Callable[[str], None]) -> list[Shape]:
    """The shapes that the options describe, for sequences of at most `max_model_len` tokens; says what they are.

    Raises ValueError (TraceError among them) if there are none.
    """
    limit: int | None = arguments.requests or None
    if arguments.trace is None:
        source = f"log-normal lengths, seed {SEED}"
        shapes = lognormal_shapes(limit or 2000)
    else:
        shapes = read_trace(arguments.trace, None if arguments.spread else limit)
        source = f"{arguments.trace.name}, {'evenly spread over it' if arguments.spread else 'from its start'}"
        if limit is not None and limit < len(shapes):
            shapes = [shapes[i * len(shapes) // limit] for i in range(limit)]
    prompts = f"{arguments.prompt_tokens} tokens each" if arguments.prompt_tokens else f"times {arguments.prompt_scale:g}"
    shapes = scaled(shapes, arguments.prompt_scale, arguments.output_scale, arguments.prompt_tokens)
    longer = len(shapes) - len(dropped(shapes, max_model_len))
    shapes = (dropped if arguments.too_long == "drop" else clipped)(shapes, max_model_len)
    if not shapes:
        raise ValueError(f"none of {longer} requests fits {max_model_len} tokens")
    say(
        f"workload: {source}, prompts {prompts}, outputs times {arguments.output_scale:g}; {longer} requests longer than "
        f"{max_model_len} tokens {arguments.too_long}ped; {len(shapes)} remain: {summary(shapes)}"
    )
    return shapes


def summary(shapes: Sequence[Shape]) -> str:
    """Totals, means and the longest."""
    prompts, outputs = [s.prompt_tokens for s in shapes], [s.output_tokens for s in shapes]
    return (
        f"{sum(prompts)} prompt tokens (mean {sum(prompts) / len(shapes):.0f}, longest {max(prompts)}), "
        f"{sum(outputs)} output tokens (mean {sum(outputs) / len(shapes):.0f}, longest {max(outputs)})"
    )


def number(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def factor(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def numbers(text: str) -> list[int]:
    """8,16,32"""
    return [positive(part) for part in text.split(",")]


def factors(text: str) -> list[float]:
    """0,0.5,1: each at least 0"""
    values = [float(part) for part in text.split(",")]
    if any(not value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text} has a number below 0")
    return values
