"""Ranks as threads of this process, without Ray or mailboxes: the whole engine in one process."""

import queue
import threading
import weakref
from collections.abc import Sequence

import torch

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles
from cluster.protocol import StepPlan, StepResult
from parallel.membership import Membership
from parallel.mesh import Mesh
from parallel.partition import partition
from workers.runner import ModelRunner, load_runner

Plans = queue.SimpleQueue[StepPlan | None]
Results = queue.SimpleQueue[StepResult]
_POLL_S = 0.1


class LocalRanks:
    """The tp x pp ranks of one engine. Plans go in by launch(), results come out by collect(), in the same order.

    After an exception in one of these two nothing more can be run. The ranks' threads end with the object.
    """

    def __init__(self, files: ModelFiles, config: Config, *, num_blocks: int | None = None, progress: bool = False) -> None:
        """Load every rank's part. num_blocks, progress: see load_runner. Raises ConfigError."""
        self.mesh = Mesh(config.tp, config.pp)
        self.usable = True
        """False once a rank has failed, or an iteration was interrupted."""
        self._step_timeout_s = config.step_timeout_s
        self._results: Results = queue.SimpleQueue()
        self._plans: list[Plans] = []
        cores = self._cores = config.threads or max(1, torch.get_num_threads() // self.mesh.size)
        if self.mesh.size == 1:
            self.runners = [load_runner(files, config, num_blocks=num_blocks, progress=progress)]
            return
        self.runners = _load(files, config, self.mesh, cores, num_blocks, progress)
        self._plans = [queue.SimpleQueue() for _ in self.runners]
        self._threads = [
            threading.Thread(target=_run, args=(rank, runner, cores, plans, self._results), name=f"rank {rank}", daemon=True)
            for rank, (runner, plans) in enumerate(zip(self.runners, self._plans, strict=True))
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, _end, self._plans)

    @property
    def num_blocks(self) -> int:
        """Blocks that every rank holds."""
        return min(runner.num_blocks for runner in self.runners)

    @property
    def host_blocks(self) -> int:
        """Blocks that every rank can keep in host memory."""
        return min(runner.host_blocks for runner in self.runners)

    @property
    def max_model_len(self) -> int:
        """The longest sequence."""
        return self.runners[0].max_model_len

    def launch(self, plan: StepPlan) -> None:
        """Begin to run an iteration; of one rank alone, run it. Raises RuntimeError where nothing more can be run."""
        self._check()
        if self._plans:
            for plans in self._plans:
                plans.put(plan)
        else:
            self.usable = False
            self._results.put(self.runners[0].execute(plan))
            self.usable = True

    def collect(self) -> StepResult:
        """The result of the oldest plan in flight. Raises RuntimeError where a rank fails or hangs."""
        self._check()
        self.usable = False
        try:
            result = self._results.get(timeout=2 * self._step_timeout_s)
        except queue.Empty:
            raise RuntimeError(f"no result for {2 * self._step_timeout_s:.0f} s") from None
        if result.error is not None:
            raise RuntimeError(f"step {result.step} failed: {result.error}")
        self.usable = True
        return result

    def close(self) -> None:
        """End the ranks' threads. One that waits for a rank that failed ends with the time-out of that exchange."""
        self.usable = False
        _end(self._plans)
        for thread in self._threads if self._plans else ():
            thread.join()

    def settle(self, rank: int) -> None:
        """Make the calling thread one of the rank's: torch keeps the number of threads and the current device per thread."""
        _settle(rank, self._cores, self.runners[rank].pool.device.type == "cuda")

    def _check(self) -> None:
        if not self.usable:
            raise RuntimeError("nothing more can be run here: a rank failed, an iteration was interrupted, or it was closed")


def _load(files: ModelFiles, config: Config, mesh: Mesh, cores: int, num_blocks: int | None, progress: bool) -> list[ModelRunner]:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    cuda = config.device != "cpu" and torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < mesh.size:
        devices = torch.cuda.device_count()
        raise ConfigError(f"tp x pp is {mesh.size}, but torch sees only {devices} CUDA devices here: each rank needs one")
    for rank in range(mesh.size):  # what can't be divided is said before any rank waits for another one
        partition(files.shape, mesh.seat(rank), config.stage_layers)
    store = HashStore()
    runners: dict[int, ModelRunner] = {}
    errors: list[Exception] = []

    def load(rank: int) -> None:
        try:
            _settle(rank, cores, cuda)
            member = Membership(mesh.seat(rank), store, wait_s=config.load_timeout_s)
            bar = progress and rank == 0
            runners[rank] = load_runner(files, config, num_blocks=num_blocks, progress=bar, membership=member)
        except Exception as error:
            errors.append(error)

    loading = [threading.Thread(target=load, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(mesh.size)]
    for thread in loading:
        thread.start()
    while any(thread.is_alive() for thread in loading) and not errors:
        for thread in loading:
            thread.join(_POLL_S)
    if errors:
        raise next((error for error in errors if isinstance(error, ConfigError)), errors[0])
    return [runners[rank] for rank in range(mesh.size)]


def _settle(rank: int, cores: int, cuda: bool) -> None:
    """The number of threads and the current device are those of the calling thread."""
    torch.set_num_threads(cores)
    if cuda:
        torch.cuda.set_device(rank)


def _run(rank: int, runner: ModelRunner, cores: int, plans: Plans, results: Results) -> None:
    """A rank's loop. It ends with the first error: whatever came after would be computed on what never was."""
    _settle(rank, cores, runner.pool.device.type == "cuda")
    while (plan := plans.get()) is not None:
        try:
            runner.expect(plan)
            result = runner.execute(plan)
        except Exception as error:
            error_text = f"{type(error).__name__}: {error}"
            results.put(StepResult(epoch=plan.epoch, step=plan.step, results=[], error=error_text))
            return
        if runner.answers:
            results.put(result)


def _end(plans: Sequence[Plans]) -> None:
    for own in plans:
        own.put(None)
