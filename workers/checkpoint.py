"""Reading a Hugging Face checkpoint tensor by tensor: memory-mapped, in one file or sharded with an index."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.config import ConfigError


class Checkpoint:
    """The tensors of a model directory. `take` checks each and notes that it was used; `finish` complains of those that were
    not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {name: safe_open(path / name, framework="pt") for name in _file_names(path)}
        self._where = {tensor: name for name, file in self._files.items() for tensor in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        self._left = set(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def take(self, name: str, *shape: int, rows: range | None = None, columns: range | None = None) -> Tensor:
        """The tensor in its own dtype, on the CPU, mapped from its file; of it these rows or columns, and no more is read.

        shape: of the whole tensor. Raises ConfigError where it is missing or of another shape.
        """
        tensor = self.take_stored(name, *shape, rows=rows, columns=columns)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ConfigError(f"{self.path}: {name} is {str(tensor.dtype)[6:]}, of which config.json says nothing")
        return tensor

    def take_stored(self, name: str, *shape: int, rows: range | None = None, columns: range | None = None) -> Tensor:
        """The same of any dtype, and of rows and columns both."""
        found = self.shape_of(name)
        if found != shape:
            raise ConfigError(f"{self.path}: {name} has shape {list(found)}, but config.json asks for {list(shape)}")
        self._left.discard(name)
        return self.peek(name, rows=rows, columns=columns)

    def peek(self, name: str, *, rows: range | None = None, columns: range | None = None) -> Tensor:
        """A tensor that is there, without saying that it is used."""
        file, shape = self._files[self._where[name]], self.shape_of(name)
        cut = tuple(
            slice(None) if own is None or len(own) == size else slice(own.start, own.stop)
            for own, size in zip((rows, columns), shape, strict=False)
        )
        whole = all(part == slice(None) for part in cut)
        tensor: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[cut]  # type: ignore[no-untyped-call]
        return tensor

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a tensor. Raises ConfigError where it is missing."""
        if name not in self._where:
            raise ConfigError(f"{self.path}: the checkpoint lacks the tensor {name}")
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())  # type: ignore[no-untyped-call]

    def ignore(self, prefix: str) -> None:
        """Say that tensors whose name begins so, if there are any, aren't needed here."""
        self._left = {name for name in self._left if not name.startswith(prefix)}

    def finish(self) -> None:
        """ConfigError where tensors were never taken: the model has parts that this decoder doesn't compute."""
        left = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ConfigError(
                f"{self.path}: the checkpoint has tensors that config.json doesn't speak of: {', '.join(left[:3])}{more}"
            )


def _file_names(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is no index of shards: {error!r}") from None
    else:
        raise ConfigError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    for name in names:
        _check_readable(path / name)
    return names


def _check_readable(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} lacks {file.name}, which its index names") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
