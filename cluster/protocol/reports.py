"""Engine -> global scheduler: what it can take, and what its prefix cache has."""

from cluster.protocol.base import Wire


class Credit(Wire):
    """What an engine can take right now, beyond all it has accepted."""

    tokens: int
    sequences: int


class EngineStats(Wire, kw_only=True):
    """A gauge reading of one engine."""

    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    slots_allocated: int = 0
    slots_used: int = 0
    slots_shared: int = 0
    blocks_cached: int = 0
    """Besides blocks_used: kept for requests to come, given up where there is need."""
    backlog: int = 0
    """Tokens of prompts, known and neither computed, nor in a launched plan, nor in the prefix cache when they came."""
    host_blocks_total: int = 0
    """The second tier of the prefix cache, in host memory."""
    host_blocks_used: int = 0


class MetricSample(Wire):
    """A counter's or a histogram bucket's running total: (Prometheus name, sorted label pairs, value)."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class EngineReport(Wire, tag=True, kw_only=True):
    """Engine -> scheduler: on change of its credit (at most once a step) and every heartbeat."""

    engine: str
    epoch: int
    number: int
    """Counts up within (engine, epoch); an older one than the last seen is dropped."""
    address: str
    ready: bool
    reason: str
    """Why it is not ready."""
    credit: Credit
    capacity: Credit
    """The credit of an idle engine."""
    max_sequence_tokens: int
    """The longest sequence (prompt + output) this engine can ever hold."""
    accepted: list[tuple[str, int]]
    """(request, attempt) accepted since the last report: no longer to be subtracted from the credit."""
    stats: EngineStats
    metrics: list[MetricSample]
    cache_changes: int = 0
    """How many CacheChanges of this epoch were sent before."""


class CacheChanges(Wire, tag=True, kw_only=True):
    """Engine -> scheduler, soon after a plan or an eviction: how its radix tree has changed."""

    engine: str
    epoch: int
    number: int
    """Counts up from 0 within (engine, epoch); where one is missing, CacheResync is the answer."""
    changes: list[tuple[bool, bytes]]
    """(added or removed, names of blocks, joined), in order."""
    whole: bool = False
    """Nothing counts that was said before: there are these blocks, and those that the next messages tell."""


class CacheResync(Wire, tag=True):
    """Scheduler -> engine: changes of this epoch are missing; send the whole."""

    engine: str
    epoch: int


class EngineStatus(Wire):
    """One engine as the scheduler sees it."""

    engine: str
    epoch: int
    ready: bool
    max_sequence_tokens: int
    stats: EngineStats
    reason: str = ""
    """Why it is not ready."""
