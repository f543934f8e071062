"""What the cluster itself counts, read from /metrics before and after a run."""

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

STAGES = "rayline:stage_compute_seconds_total"
ITERATIONS = "rayline:iterations_total"
COMPUTED = "rayline:computed_tokens_total"
PREEMPTED = "vllm:num_preemptions_total"
_NAMES = (STAGES, ITERATIONS, COMPUTED, PREEMPTED)
_QUIET_S = 3.5
"""Totals reach /metrics by reports, about one a second from worker to engine, to scheduler and to routers."""
_LIMIT_S = 60.0


@dataclass(frozen=True)
class Counters:
    """Totals by metric, summed over engines and stages."""

    totals: Mapping[str, float]

    def since(self, before: "Counters") -> "Counters":
        """What was added."""
        return Counters({name: value - before.totals.get(name, 0.0) for name, value in self.totals.items()})

    def idle_share(self, stages: int, seconds: float) -> float:
        """The pipeline's bubble: the share, 0 to 1, of `seconds` in which the `stages` of all engines did not compute. What a stage
        waits for its tensor-parallel peers counts as computing, what an engine has no request for as idle."""
        return 1.0 - self.totals[STAGES] / (stages * seconds)

    @property
    def tokens_per_iteration(self) -> float | None:
        """Prompt and output tokens of an iteration, on average; None where there was none."""
        iterations = self.totals[ITERATIONS]
        return self.totals[COMPUTED] / iterations if iterations else None


def parse(text: str) -> Counters:
    """Of Prometheus' text format; what it lacks is 0."""
    totals = dict.fromkeys(_NAMES, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
    return Counters(totals)


def read(url: str) -> Counters:
    """As they are known now. Raises OSError."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return parse(answer.read().decode())


def settled(url: str, quiet_s: float = _QUIET_S) -> Counters:
    """Once nothing has been added for `quiet_s`: to be called when no request is left. Raises RuntimeError after a minute."""
    end = time.monotonic() + _LIMIT_S
    last, since = read(url), time.monotonic()
    while time.monotonic() - since < quiet_s:
        if time.monotonic() > end:
            raise RuntimeError("the engines still compute after a minute without requests")
        time.sleep(0.25)
        if (seen := read(url)) != last:
            last, since = seen, time.monotonic()
    return last
