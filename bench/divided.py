"""A model divided among ranks that are threads of this process, driven like one runner, so that its logits can be looked at."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles
from parallel.mesh import Mesh
from parallel.partition import partition
from workers.device import resolve_device
from workers.local import LocalRanks
from workers.runner import ModelRunner
from workers.sequences import Span

MESHES = {"2 tensor-parallel ranks": Mesh(tp=2), "4 tensor-parallel ranks": Mesh(tp=4), "2 pipeline stages": Mesh(pp=2)}
"""The divisions whose flips are counted, by the cause's name: each sequence alone on so many ranks, against the undivided model."""
BATCH = 8


def in_batch(name: str) -> str:
    """The cause beside each of MESHES: so many sequences at a time, against each alone on as many ranks."""
    return f"batch of {BATCH}, {name}"


CAUSES = tuple(cause for name in MESHES for cause in (name, in_batch(name)))


class Divided:
    """All ranks of a mesh: what they are asked for is what the first rank of the last stage answers. close() when done."""

    def __init__(self, files: ModelFiles, config: Config, *, num_blocks: int) -> None:
        """config.tp and config.pp say how it is divided. Raises ConfigError."""
        self._ranks = LocalRanks(files, config, num_blocks=num_blocks)
        self._tp, self._pp = config.tp, config.pp
        self._threads = [
            ThreadPoolExecutor(1, f"rank {rank}", self._ranks.settle, (rank,)) for rank in range(config.tp * config.pp)
        ]
        self.shape = files.shape
        self.kernels = self._ranks.runners[(self._pp - 1) * self._tp].decoder.kernels
        self.pool = self._ranks.runners[(self._pp - 1) * self._tp].pool
        self.num_blocks = self._ranks.num_blocks

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Run the spans as one flat batch, stage after stage -> [num_tokens, hidden]."""
        hidden = self._at_once(0, lambda runner: runner.forward(spans))
        for stage in range(1, self._pp):
            hidden = self._handed_on(stage, spans, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] rows of `forward` -> [n, vocab] fp32."""
        return self._at_once(self._pp - 1, lambda runner: runner.decoder.logits(hidden.to(runner.pool.device)))

    def close(self) -> None:
        """End all threads."""
        for thread in self._threads:
            thread.shutdown()
        self._ranks.close()

    def _handed_on(self, stage: int, spans: Sequence[Span], hidden: Tensor) -> Tensor:
        """Each rank gets a copy of its own, which it may overwrite."""
        return self._at_once(stage, lambda runner: runner.forward(spans, hidden.to(runner.pool.device, copy=True)))

    def _at_once(self, stage: int, call: Callable[[ModelRunner], Tensor]) -> Tensor:
        """Call all ranks of a stage at once; what its first rank returns."""

        @torch.inference_mode()
        def called(runner: ModelRunner) -> Tensor:
            return call(runner)

        ranks = range(stage * self._tp, (stage + 1) * self._tp)
        running = [self._threads[rank].submit(called, self._ranks.runners[rank]) for rank in ranks]
        first, *_ = [each.result() for each in running]
        return first


def can_divide(files: ModelFiles, config: Config) -> bool:
    """Whether the model has heads and layers for so many ranks, and torch a device for each."""
    mesh = Mesh(config.tp, config.pp)
    try:
        partition(files.shape, mesh.seat(0), config.stage_layers)
    except ConfigError:
        return False
    return resolve_device(config.device).type == "cpu" or torch.cuda.device_count() >= mesh.size
