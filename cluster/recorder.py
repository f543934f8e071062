"""The timeline of an engine's stages as a file: JSON lines, which `python -m bench.timeline FILE` draws."""

import json
import logging
from pathlib import Path

from cluster.protocol import StageTimes

log = logging.getLogger(__name__)


class Recorder:
    """Appends what stages tell of their plans. Several engines of one machine may write to one file, each line at once."""

    def __init__(self, path: Path, engine: str) -> None:
        self._engine = engine
        self._path = path
        self._broken = False

    def write(self, message: StageTimes) -> None:
        """A line for each plan. A file that can't be written is complained of once."""
        where = {"engine": self._engine, "epoch": message.epoch, "stage": message.stage}
        lines = [
            json.dumps({**where, "step": time.step, "start": time.start, "end": time.end, "tokens": time.num_tokens})
            for time in message.times
        ]
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            if not self._broken:
                log.error("the timeline cannot be written to %s: %s", self._path, error.strerror)
            self._broken = True
