"""The Ray actor of one rank: loads its share of the model and serves plans. A thin shell around workers/serve.py."""

import logging

import ray

from cluster.channel import Mailbox
from cluster.config import Config, ConfigError
from cluster.model import open_model
from cluster.protocol import WorkerFailed, WorkerMessage, WorkerReady
from workers.serve import serve_plans

log = logging.getLogger(__name__)


class Worker:
    """One rank of one epoch of one engine."""

    def __init__(self, config: Config, rank: int, epoch: int, engine: str, store: str = "", secret: str = "") -> None:
        self._config, self._rank, self._epoch, self._engine = config, rank, epoch, engine
        logging.basicConfig(level=logging.INFO, format=f"[worker {rank}] %(levelname)s %(message)s")

    def run(self) -> str:
        """Load, announce, serve; returns why it ended. The task's end is how the engine's shell sees that the worker is gone."""
        with Mailbox[WorkerMessage](WorkerMessage, ray.util.get_node_ip_address()) as mailbox:
            try:
                from workers.runner import load_runner  # torch takes seconds to import: after the mailbox, inside the time-out

                runner = load_runner(open_model(self._config.model, self._config.revision), self._config, progress=True)
            except (ConfigError, MemoryError, OSError) as error:
                log.error("could not load: %s", error)
                mailbox.send(self._engine, WorkerFailed(epoch=self._epoch, rank=self._rank, reason=str(error)))
                return str(error)
            ready = WorkerReady(
                epoch=self._epoch,
                rank=self._rank,
                address=mailbox.address,
                num_blocks=runner.num_blocks,
                max_model_len=runner.max_model_len,
            )
            mailbox.send(self._engine, ready)
            silence_s = 2 * self._config.step_timeout_s
            return serve_plans(runner, mailbox, self._engine, self._epoch, self._rank, silence_s)
