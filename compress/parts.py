"""A model directory that is written bit by bit, and can be gone on with after an interruption.

Beside the directory to come is a folder of its parts: a file of tensors for each layer and one for the rest, each put in place when
it is whole, and the settings they were made with. The last step puts them together in files of 5 GB, in a folder that is then given
its name: no half of a model is ever to be seen there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.config import ConfigError

SHARD_BYTES = 5_000_000_000
_SETTINGS, _MODEL = "settings.json", "model"


class Parts:
    """What there is so far of the model directory `out`."""

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """settings: what parts depend on. Raises ConfigError where there is something that must not be lost, or that was begun with
        other settings."""
        refuse_taken(out)
        self.out, self.folder = out, _beside(out)
        if self.folder.exists() and not resume:
            if self.finished:
                raise ConfigError(f"{self.folder} is there from before: go on with --resume, or remove it")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settle(_SETTINGS, settings)

    def settle(self, name: str, settings: dict[str, Any]) -> None:
        """Write down, in a file of this name, what is made from here on depends on. Raises ConfigError where it was begun with
        other settings."""
        told = self.folder / name
        if not told.exists():
            new = told.with_suffix(".new")
            new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            new.replace(told)
            return
        before = json.loads(told.read_text(encoding="utf-8"))
        changed = sorted(name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name))
        if changed:
            raise ConfigError(f"{self.folder} was begun with other settings: {', '.join(changed)}")

    @property
    def finished(self) -> int:
        """Parts that are there, from the first on."""
        number = 0
        while self._part(number).exists():
            number += 1
        return number

    @property
    def model(self) -> Path:
        """The whole model, before it is put in its place."""
        return self.folder / _MODEL

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Put a part in place."""
        new = self._part(number).with_suffix(".new")
        write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, new)
        new.replace(self._part(number))

    def assemble(self, count: int) -> None:
        """Put the first `count` parts together: one file, or an index and files of at most SHARD_BYTES, or a single tensor more."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()
        shards, sizes = self._plan(count)
        if len(shards) == 1:
            self._write_shard("model.safetensors", shards[0])
            return
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_shard(name, shard)
            where |= dict.fromkeys((tensor for tensor, _ in shard), name)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Give the model its place, and forget the rest."""
        if self.out.exists():
            self.out.rmdir()
        self.model.replace(self.out)
        shutil.rmtree(self.folder)

    def _plan(self, count: int) -> tuple[list[list[tuple[str, Path]]], dict[str, int]]:
        """Of each file to write its tensors and the parts they are in; and all tensors' bytes."""
        shards: list[list[tuple[str, Path]]] = [[]]
        sizes: dict[str, int] = {}
        filled = 0
        for part in (self._part(number) for number in range(count)):
            with safe_open(part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    sizes[name] = file.get_tensor(name).nbytes
                    if filled and filled + sizes[name] > SHARD_BYTES:
                        shards.append([])
                        filled = 0
                    shards[-1].append((name, part))
                    filled += sizes[name]
        return shards, sizes

    def _write_shard(self, name: str, tensors: list[tuple[str, Path]]) -> None:
        found: dict[str, Tensor] = {}
        for part in dict.fromkeys(part for _, part in tensors):
            with safe_open(part, framework="pt") as file:
                found |= {tensor: file.get_tensor(tensor) for tensor, own in tensors if own == part}
        write_tensors(found, self.model / name)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def refuse_taken(out: Path) -> None:
    """ConfigError where the directory `out`, or that of its parts, holds something of somebody else's."""
    if not out.name:
        raise ConfigError(f"{out} is no name for a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already")
    folder = _beside(out)
    if folder.exists() and not (folder / _SETTINGS).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already and holds no unfinished model: its place is needed")


def _beside(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A file that all can read."""
    save_file(tensors, file, {"format": "pt"})
    file.chmod(0o644)  # safetensors lets its owner alone read it
