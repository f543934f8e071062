"""Ranks as threads of this process, without Ray or mailboxes: the whole engine in one process."""

import queue
import threading

import torch

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles
from cluster.protocol import StepPlan, StepResult
from parallel.membership import Membership
from parallel.mesh import Mesh
from workers.runner import ModelRunner, load_runner


class LocalRanks:
    """The tp x pp ranks of one engine. Plans go in by launch(), results come out by collect(), in the same order."""

    def __init__(self, files: ModelFiles, config: Config, *, num_blocks: int | None = None, progress: bool = False) -> None:
        """Load every rank's part. num_blocks, progress: see load_runner. Raises ConfigError."""
        self.mesh = Mesh(config.tp, config.pp)
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self._plans: list[queue.SimpleQueue[StepPlan | None]] = [queue.SimpleQueue() for _ in range(self.mesh.size)]
        self._threads: list[threading.Thread] = []
        self.usable = True
        """False once a rank has failed."""
        self._cores = config.threads or max(1, torch.get_num_threads() // self.mesh.size)
        if self.mesh.size == 1:
            self.runners = [load_runner(files, config, num_blocks=num_blocks, progress=progress)]
        else:
            self.runners = self._load(files, config, num_blocks, progress)

    @property
    def num_blocks(self) -> int:
        """Blocks that every rank holds."""
        return min(runner.num_blocks for runner in self.runners)

    @property
    def max_model_len(self) -> int:
        """The longest sequence."""
        return self.runners[0].max_model_len

    def launch(self, plan: StepPlan) -> None:
        """Begin to run an iteration; of one rank alone, run it."""
        if self.mesh.size > 1:
            for plans in self._plans:
                plans.put(plan)
            return
        self.usable = False
        self._results.put(self.runners[0].execute(plan))
        self.usable = True

    def collect(self) -> StepResult:
        """The result of the oldest plan in flight. Raises RuntimeError where a rank failed: then nothing more can be run."""
        result = self._results.get()
        if result.error is not None:
            self.usable = False
            raise RuntimeError(f"step {result.step} failed: {result.error}")
        return result

    def close(self) -> None:
        """End the ranks' threads. One that waits for a rank that failed ends with the time-out of that exchange."""
        for plans in self._plans:
            plans.put(None)
        for thread in self._threads:
            thread.join()

    def settle(self, rank: int) -> None:
        """Make the calling thread one of the rank's: torch keeps the number of threads and the current device per thread."""
        torch.set_num_threads(self._cores)
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())

    def _load(self, files: ModelFiles, config: Config, num_blocks: int | None, progress: bool) -> list[ModelRunner]:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        store = HashStore()
        runners: list[ModelRunner | None] = [None] * self.mesh.size
        errors: list[Exception] = []

        if config.device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() < self.mesh.size:
            devices = torch.cuda.device_count()
            raise ConfigError(f"tp x pp is {self.mesh.size}, but torch sees only {devices} CUDA devices here: each rank needs one")

        def load(rank: int) -> None:
            self.settle(rank)
            try:
                member = Membership(self.mesh.seat(rank), store, wait_s=config.load_timeout_s)
                bar = progress and rank == 0
                runners[rank] = load_runner(files, config, num_blocks=num_blocks, progress=bar, membership=member)
            except Exception as error:
                errors.append(error)

        loading = [threading.Thread(target=load, args=(rank,), name=f"rank {rank}") for rank in range(self.mesh.size)]
        for thread in loading:
            thread.start()
        for thread in loading:
            thread.join()
        if errors:
            raise next((error for error in errors if isinstance(error, ConfigError)), errors[0])
        loaded = [runner for runner in runners if runner is not None]
        self._threads = [
            threading.Thread(target=self._run, args=(rank, runner), name=f"rank {rank}", daemon=True)
            for rank, runner in enumerate(loaded)
        ]
        for thread in self._threads:
            thread.start()
        return loaded

    def _run(self, rank: int, runner: ModelRunner) -> None:
        self.settle(rank)
        while (plan := self._plans[rank].get()) is not None:
            try:
                runner.expect(plan)
                result = runner.execute(plan)
            except Exception as error:
                result = StepResult(epoch=plan.epoch, step=plan.step, results=[], error=f"{type(error).__name__}: {error}")
            if runner.answers or result.error is not None:
                self._results.put(result)
