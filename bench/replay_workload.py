"""A trace's requests with tokens that are equal just where the trace says that prompts are."""

import itertools
from collections.abc import Sequence
from functools import cached_property

from bench.workload import Shape
from kv.names import BlockNames


class Workload:
    """A trace's requests, whose tokens are made when they are asked for: all at once they would not fit."""

    def __init__(self, shapes: Sequence[Shape], block_size: int = 16) -> None:
        self.shapes = list(shapes)
        self.block_size = block_size
        self._own = 1 + max((id for shape in shapes for id in shape.blocks), default=0)
        self._starts = list(itertools.accumulate((shape.total for shape in shapes), initial=0))

    def prompt(self, index: int) -> list[int]:
        """Token ids: consecutive ones, which begin where the block's number says, so that no two blocks have any in common."""
        shape = self.shapes[index]
        size, tokens = shape.block_tokens, list[int]()
        for id in shape.blocks:
            tokens.extend(range(id * size, (id + 1) * size))
        missing = shape.prompt_tokens - len(tokens)
        first = self._first_own(index)
        return tokens + list(range(first, first + missing)) if missing > 0 else tokens[: shape.prompt_tokens]

    def output(self, index: int) -> range:
        """Token ids that no other request has."""
        shape = self.shapes[index]
        first = self._first_own(index) + shape.prompt_tokens
        return range(first, first + shape.output_tokens)

    def _first_own(self, index: int) -> int:
        return self._own * self.shapes[index].block_tokens + self._starts[index]

    @cached_property
    def different_blocks(self) -> int:
        """Whole blocks in the prompts, equal ones counted once."""
        longest: dict[int, int] = {}
        own = 0
        for shape in self.shapes:
            left = shape.prompt_tokens
            for id in shape.blocks:
                longest[id] = max(longest.get(id, 0), min(left, shape.block_tokens))
                left = max(0, left - shape.block_tokens)
            own += left // self.block_size
        return own + sum(tokens // self.block_size for tokens in longest.values())

    @cached_property
    def key(self) -> BlockNames:
        """What blocks are named by."""
        return BlockNames("replay", self.block_size)

    @cached_property
    def names(self) -> list[bytes]:
        """Of each prompt's blocks: the router's part, made once for all runs."""
        return [self.key.of_prompt(self.prompt(index)) for index in range(len(self.shapes))]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(shape.prompt_tokens for shape in self.shapes)
