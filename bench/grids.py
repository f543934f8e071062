"""tp x pp x engines on the command line, and ranges of lengths. Pure."""

import argparse
import random
import re
from dataclasses import dataclass

from bench.workload import SEED, Shape
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Grid:
    """How a model is laid out over a cluster."""

    tp: int = 1
    pp: int = 1
    engines: int = 1

    def __str__(self) -> str:
        return f"{self.tp}x{self.pp}x{self.engines}"

    @property
    def mesh(self) -> Mesh:
        """The ranks of one engine."""
        return Mesh(self.tp, self.pp)

    @property
    def ranks(self) -> int:
        """Of all engines: GPUs, or worker processes on CPUs."""
        return self.mesh.size * self.engines


def parse_grids(text: str) -> list[Grid]:
    """'1x1x1,2x1x1': tp x pp x engines each, in the order to run. Raises argparse.ArgumentTypeError."""
    grids = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part)
        if not found or "0" in (sizes := [str(int(number)) for number in found.groups()]):
            raise argparse.ArgumentTypeError(f"'{part}' is no grid: write tp x pp x engines, each at least 1, as 2x1x1")
        grids.append(Grid(*map(int, sizes)))
    twice = next((grid for grid in grids if grids.count(grid) > 1), None)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{twice} stands there twice")
    return grids


def parse_range(text: str) -> tuple[int, int]:
    """'32:256', or '128' for a fixed length; lengths in tokens, at least 1. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"'{text}' is no range of lengths: write 32:256, or 128 for all alike")
    return low, high


def random_shapes(count: int, prompts: tuple[int, int], outputs: tuple[int, int]) -> list[Shape]:
    """Lengths drawn evenly between bounds, both included; always the same ones, and fewer are the first of more."""
    drawn = random.Random(SEED)
    return [Shape(drawn.randint(*prompts), drawn.randint(*outputs)) for _ in range(count)]
