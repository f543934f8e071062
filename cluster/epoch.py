"""One life of an engine's workers, and the settings that it goes by. No I/O: part of the engine's state machine."""

import dataclasses
from dataclasses import dataclass, field

from cluster.batcher import Batcher
from cluster.cache_news import CacheNews
from cluster.config import BatchConfig
from cluster.protocol import WorkerReady
from cluster.pulls import PullCounts, Pulls
from kv.manager import KVManager
from kv.names import BlockNames


@dataclass(frozen=True)
class EngineConfig:
    """An engine's settings. num_blocks, max_model_len and host_blocks of `batch` are replaced by what its workers report."""

    name: str
    address: str
    """Of the engine's own mailbox."""
    scheduler: str
    """Address of the global scheduler, as far as known at the start."""
    batch: BatchConfig
    num_ranks: int = 1
    step_timeout_s: float = 60.0
    worker_timeout_s: float = 8.0
    load_timeout_s: float = 600.0
    heartbeat_s: float = 1.0
    longest_backoff_s: float = 30.0
    names: BlockNames | None = None
    """For a scheduler that places by prefixes: how it is told of blocks. None: it need not be told."""
    pull_timeout_s: float | None = None
    """KV pulled from another engine is to be here within so long. None: nothing is pulled or given."""


@dataclass
class Epoch:
    """What lasts as long as one set of workers."""

    config: EngineConfig

    number: int
    began_at: float
    start_at: float | None
    """When to start its workers, if that has not been done (back-off after a failure)."""
    ready: dict[int, WorkerReady] = field(default_factory=dict)
    batcher: Batcher | None = None
    progress_at: float = 0.0
    """Last sign of progress: a step's result, or the launch that ended an idle time."""
    pinged_at: float = 0.0
    heard_at: dict[int, float] = field(default_factory=dict)
    """By rank, once it is ready: its last sign of life."""
    results: int = 0
    news: CacheNews | None = None
    """Of its radix tree, for the scheduler."""
    waiting: str = ""
    """Why its workers can't start yet, where something is missing."""
    pulls: Pulls | None = None
    """KV from and to other engines."""

    def stood_still(self, gap: float, now: float) -> None:
        """The engine's process did, for so long: nobody else had a chance to be heard."""
        self.began_at, self.progress_at = min(now, self.began_at + gap), min(now, self.progress_at + gap)
        self.heard_at = {rank: min(now, heard + gap) for rank, heard in self.heard_at.items()}
        if self.pulls is not None:
            self.pulls.forgive(gap)

    def why_over(self, now: float) -> str:
        """The watchdog: on signs of life and on progress, not on whether a process still exists. "" if all is well."""
        config = self.config
        silent = [rank for rank, heard in self.heard_at.items() if now - heard > config.worker_timeout_s]
        if silent:
            return f"no sign of life from worker {silent[0]} for {config.worker_timeout_s:.0f} s"
        if self.batcher is None:
            waiting = f": {self.waiting}" if self.waiting else ""
            late = now - self.began_at > config.load_timeout_s
            return f"workers not ready after {config.load_timeout_s:.0f} s{waiting}" if late else ""
        if self.batcher.in_flight and now - self.progress_at > config.step_timeout_s:
            return f"a step without result for {config.step_timeout_s:.0f} s"
        return self.pulls.hung(now) if self.pulls is not None else ""

    def is_ready(self, message: WorkerReady, now: float, counts: PullCounts) -> bool:
        """A worker has loaded; True if it is the last one: then this can serve. Raises ConfigError where it can't."""
        config = self.config
        self.ready[message.rank] = message
        self.heard_at[message.rank] = now
        if len(self.ready) < config.num_ranks or self.batcher is not None:
            return False
        ranks = [self.ready[rank] for rank in range(config.num_ranks)]
        batch = dataclasses.replace(
            config.batch,
            num_blocks=min(rank.num_blocks for rank in ranks),
            max_model_len=min(rank.max_model_len for rank in ranks),
            host_blocks=min(rank.host_blocks for rank in ranks),
        )
        self.news = CacheNews(config.name, self.number, config.names) if config.names is not None else None
        kv = KVManager(batch, self.news.log if self.news is not None else None)
        self.batcher = Batcher(batch, kv, self.number)
        if config.pull_timeout_s is not None and all(rank.store for rank in ranks):
            self.pulls = Pulls(config.name, self.number, config.address, self.batcher, ranks, config.pull_timeout_s, counts)
        return True
