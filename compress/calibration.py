"""Text for calibration and measurement, as rows of token ids; and the hidden states of those rows, which go from layer to layer on
disk."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.model import ModelFiles
from compress.corpus import GOLDEN, collect, standard_library
from compress.distill import read_text
from router.tokenizer import load

_MORE = 4
"""So many times the tokens that are needed are made, for the rows to be spread over."""


def calibration_text(paths: Sequence[Path]) -> list[str]:
    """Of files and folders; without any, Python's standard library."""
    return read_text(paths) if paths else [document.text for document in collect(standard_library()).training]


def held_out_text(paths: Sequence[Path]) -> list[str]:
    """The same to measure on; by default those files of the standard library that calibration does not see."""
    return read_text(paths) if paths else [document.text for document in collect(standard_library()).held_out]


def rows_of(files: ModelFiles, texts: Sequence[str], count: int, length: int) -> Tensor:
    """[count, length] int64 ids, or fewer where the texts are short: rows that do not overlap, from all over the texts. Raises
    ConfigError where there is not one.

    Of many texts only about as many as needed are tokenized.
    """
    tokenizer = load(files.path)
    ids: list[int] = []
    for number in _spread(len(texts)):
        ids += [*tokenizer.encode_now(texts[number], add_special_tokens=False), *files.eos_token_ids[:1]]
        if len(ids) >= _MORE * count * length:
            break
    if len(ids) < length:
        raise ConfigError(f"the text has {len(ids)} tokens; at least {length} are needed")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[_spread(len(rows))[:count]]


def _spread(count: int) -> list[int]:
    """All numbers below `count`, so that the first few of them are from all over."""
    return sorted(range(count), key=lambda number: number * GOLDEN % 1.0)


class HiddenStates:
    """The input of each layer, fp32 [rows, length, hidden], in a file that is mapped into memory: the system keeps of it what it
    has room for. That of the next layer is a second file; the first goes when a layer is finished."""

    def __init__(self, folder: Path, rows: Tensor, hidden: int) -> None:
        """rows [n, length] ids, hidden: features."""
        self._folder, self._shape = folder, (*rows.shape, hidden)

    def create(self, layer: int) -> Tensor:
        """Room for what goes into a layer. Raises OSError where the disk has none."""
        with self._file(layer).open("ab") as file:  # else a full disk would kill whoever writes into the mapping
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(self._shape))
        return self._mapped(layer)

    def read(self, layer: int) -> Tensor:
        """What goes into a layer. Raises ConfigError where its file is gone."""
        if not self._file(layer).exists():
            raise ConfigError(f"{self._file(layer)} is gone, with which layer {layer} would go on: begin anew")
        return self._mapped(layer)

    def drop(self, layer: int) -> None:
        """It is not needed any more."""
        self._file(layer).unlink(missing_ok=True)

    def _mapped(self, layer: int) -> Tensor:
        size = math.prod(self._shape)
        mapped = torch.from_file(str(self._file(layer)), shared=True, size=size, dtype=torch.float32)
        return mapped.view(self._shape)

    def _file(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:05d}.f32"
