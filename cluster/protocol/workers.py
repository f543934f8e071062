"""Engine <-> workers: their life-cycle."""

from cluster.protocol.base import Wire


class WorkerReady(Wire, tag=True, kw_only=True):
    """Worker -> engine: weights and KV pool are in place."""

    epoch: int
    rank: int
    address: str
    num_blocks: int
    """How many blocks of the engine's block size this worker's pool holds, the null block included."""
    max_model_len: int
    layout: str = ""
    """What its pool is like (see Pull) ..."""
    store: str = ""
    """... and where ranks of other engines meet it; empty: nowhere."""
    host_blocks: int = 0
    """How many blocks it can keep in host memory besides."""


class WorkerFailed(Wire, tag=True, kw_only=True):
    """Worker -> engine: loading failed, and would fail again in the same way (a bad checkpoint, too little memory)."""

    epoch: int
    rank: int
    reason: str


class Ping(Wire, tag=True):
    """Engine -> each worker, every few seconds: prove that you live, and know that I do."""

    epoch: int


class Pong(Wire, tag=True):
    """Worker -> engine, also while it computes."""

    epoch: int
    rank: int


class StageTime(Wire):
    """One plan in one stage, from when its input was there to when its output was handed over. Unix times in seconds."""

    step: int
    start: float
    end: float
    num_tokens: int


class StageTimes(Wire, tag=True):
    """Leader of a stage -> engine, about once a second: when it computed since the last such message."""

    epoch: int
    stage: int
    times: list[StageTime]
