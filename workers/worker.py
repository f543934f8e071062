"""The Ray actor of one rank: a thin shell around workers/rank.py."""

import logging

import ray

from cluster.config import Config
from workers.rank import run_rank


class Worker:
    """One rank of one epoch of one engine."""

    def __init__(self, config: Config, rank: int, epoch: int, engine: str, store: str, secret: str) -> None:
        """See workers.rank.run_rank."""
        self._arguments = (config, rank, epoch, engine, store, secret)
        logging.basicConfig(level=logging.INFO, format=f"[worker {rank}] %(levelname)s %(message)s")

    def run(self) -> str:
        """Until the worker ends: why it did. The task's end is how the engine's shell sees that the worker is gone."""
        return run_rank(*self._arguments, host=ray.util.get_node_ip_address())
