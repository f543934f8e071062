"""The table of docs/exactness.md: how its rows look, and how those of one part are replaced (bench.exactness)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import divided

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "exactness.md"
BEGIN, END = "<!-- table: python -m bench.exactness --write -->", "<!-- end of table -->"


@dataclass
class Tally:
    """One row of the table."""

    tokens: int = 0
    greedy: int = 0
    drawn: int = 0
    largest: float = 0.0
    """Difference between two logits."""


def interval(flips: int, tokens: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); for no flips its upper end is 3.84 / tokens."""
    z2 = 1.96**2
    middle = (flips + z2 / 2) / (tokens + z2)
    half = math.sqrt(z2 * (flips * (tokens - flips) / tokens + z2 / 4)) / (tokens + z2)
    return max(0.0, middle - half) if flips else 0.0, middle + half


def rate(flips: int, tokens: int) -> str:
    """Flips per 10,000 with their interval."""
    if not tokens:
        return "not counted"
    low, high = interval(flips, tokens)
    return f"{1e4 * flips / tokens:.3g} ({1e4 * low:.2g} to {1e4 * high:.2g})"


def row(model: str, dtype: str, cause: str, tally: Tally) -> str:
    """A line of the table."""
    cells = [model, dtype, cause, f"{tally.tokens}", rate(tally.greedy, tally.tokens), rate(tally.drawn, tally.tokens)]
    return f"| {' | '.join(cells)} | {f'{tally.largest:.1e}' if tally.tokens else '-'} |"


HEADER = (
    "| model | dtype | cause | tokens | greedy flips per 10,000 (95 %) | drawn flips per 10,000 (95 %) | largest logit gap |",
    "|---|---|---|---|---|---|---|",
)


class Part(NamedTuple):
    """Rows that one command gave: all causes of one model and dtype, those of a divided model apart."""

    model: str
    dtype: str
    divided: bool = False

    def __str__(self) -> str:
        """What its line below the table begins with."""
        return f"{self.model}, {self.dtype}" + (", divided" if self.divided else "")


@dataclass
class Measured:
    """What the page has of one part."""

    source: str
    """Device, command line and machine, as one line says them."""
    rows: list[str] = field(default_factory=list)


def source(device: str, command: str, machine: str) -> str:
    """A part's line below the table, from the device on."""
    return f"{device}, `{command}`, {machine}"


_ROW = re.compile(r"\| ([^|]+) \| ([^|]+) \| ([^|]+) \| \d+ \|")
_SOURCE = re.compile(r"- ([^,]+), ([^,:]+)(, divided)?: ((?:cpu|cuda), `[^`]+`, .+)")


def read_page(page: Path = PAGE) -> dict[Part, Measured]:
    """What stands between the markers. Raises ValueError for a row without a source."""
    lines = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()
    sources = [match for line in lines if (match := _SOURCE.fullmatch(line))]
    found = {Part(match[1], match[2], match[3] is not None): Measured(match[4]) for match in sources}
    for line in lines:
        if match := _ROW.match(line):
            part = Part(match[1], match[2], match[3] in divided.CAUSES)
            if part not in found:
                raise ValueError(f"{page.name} does not say what gave: {line}")
            found[part].rows.append(line)
    return found


def write_page(measured: Mapping[Part, Measured], page: Path = PAGE) -> None:
    """Put the parts between the markers, in place of what was there of just these; those of a model and dtype side by side."""
    found = {**read_page(page), **measured}
    pairs = list(dict.fromkeys((part.model, part.dtype) for part in found))
    parts = sorted(found, key=lambda part: (pairs.index((part.model, part.dtype)), part.divided))
    rows = [row for part in parts for row in found[part].rows]
    sources = [f"- {part}: {found[part].source}" for part in parts]
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    lines = (before + BEGIN, "", *HEADER, *rows, "", "What gave the rows:", "", *sources, "", END)
    page.write_text("\n".join(lines) + rest.split(END)[1], encoding="utf-8")
