"""Metrics under the names a vLLM user knows: recorded in each router, summed by the scheduler, shown by any router.

What a router counts (latencies, tokens, ends) goes to the scheduler with its heartbeat as running totals, and comes back in
ClusterStatus summed over the cluster. `render` turns such a status into Prometheus' text format. What vLLM has no name for is
called rayline:.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.protocol import ClusterStatus, EngineStatus, MetricSample

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_INTER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)

HELP = {
    "vllm:time_to_first_token_seconds": "From a request's arrival to its first token.",
    "vllm:inter_token_latency_seconds": "Between two consecutive deliveries of tokens of one choice.",
    "vllm:e2e_request_latency_seconds": "From a request's arrival to the end of a choice.",
    "vllm:request_queue_time_seconds": "From a request's arrival to its first iteration.",
    "vllm:request_prompt_tokens": "Prompt length of a request.",
    "vllm:request_generation_tokens": "Tokens generated for a choice.",
    "vllm:prompt_tokens": "Prompt tokens of requests whose first token came, or that ended without any.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:request_success": "Choices that ended, by reason.",
    "vllm:num_requests_running": "Sequences in the running set of an engine.",
    "vllm:num_requests_waiting": "Requests waiting in an engine, or (engine='queue') in the cluster-wide queue.",
    "vllm:kv_cache_usage_perc": "Blocks in use as a share of the engine's pool, 0 to 1.",
    "rayline:kv_waste_ratio": "Share of the allocated KV slots that hold no token.",
    "rayline:kv_slots_shared": "KV slots saved by sharing prefixes.",
    "rayline:kv_host_usage_ratio": "Blocks kept in host memory as a share of what that holds, 0 to 1.",
    "rayline:plans_in_flight": "Iterations launched and not yet returned.",
    "rayline:messages_dropped": "Messages that came in and were none, or could not be sent, by process and direction.",
    "rayline:connections_refused": "Connections to a process's mailbox that did not prove the cluster's secret; each try counts.",
    "rayline:engine_ready": "1 if the engine takes requests.",
    "rayline:engine_epoch": "Which life of its workers the engine is in.",
    "rayline:scheduler_up": "1 if the scheduler has reported to the router that was asked.",
}

_Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of observations by upper bound, in seconds or tokens."""

    def __init__(self, name: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """A value on a bound is within it, as Prometheus has it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> list[MetricSample]:
        """Cumulative buckets up to +Inf, sum and count."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        totals = list(accumulate(self._counts))
        buckets = [
            MetricSample(f"{self._name}_bucket", (("le", bound),), total) for bound, total in zip(bounds, totals, strict=True)
        ]
        return [*buckets, MetricSample(f"{self._name}_sum", (), self._sum), MetricSample(f"{self._name}_count", (), totals[-1])]


class RouterMetrics:
    """What one router process has counted since it started."""

    def __init__(self) -> None:
        self._first_token = Histogram("vllm:time_to_first_token_seconds", _FIRST_TOKEN)
        self._inter_token = Histogram("vllm:inter_token_latency_seconds", _INTER_TOKEN)
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", _REQUEST)
        self._queue = Histogram("vllm:request_queue_time_seconds", _REQUEST)
        self._prompt_length = Histogram("vllm:request_prompt_tokens", _TOKENS)
        self._output_length = Histogram("vllm:request_generation_tokens", _TOKENS)
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._ends = dict.fromkeys(("stop", "length", "abort", "error"), 0)

    def queued(self, seconds: float) -> None:
        """A generation's first plan was launched so long after it arrived (the queue's wait and the engine's)."""
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A generation's first token came."""
        self._first_token.observe(seconds)

    def prompt(self, tokens: int) -> None:
        """A generation's first token came, or it ended without any."""
        self._prompt_length.observe(tokens)
        self._prompt_tokens += tokens

    def inter_token(self, seconds: float) -> None:
        """A choice got tokens, so long after it last did."""
        self._inter_token.observe(seconds)

    def generated(self, tokens: int) -> None:
        """So many tokens came."""
        self._generation_tokens += tokens

    def finished(self, reason: str, tokens: int, seconds: float) -> None:
        """A choice ended with so many tokens. `reason`: stop, length, abort (the client left) or error."""
        self._ends[reason] += 1
        if reason in ("stop", "length"):
            self._e2e.observe(seconds)
            self._output_length.observe(tokens)

    def samples(self) -> list[MetricSample]:
        """Running totals, for the heartbeat."""
        histograms = (self._first_token, self._inter_token, self._e2e, self._queue, self._prompt_length, self._output_length)
        samples = [sample for histogram in histograms for sample in histogram.samples()]
        samples.append(MetricSample("vllm:prompt_tokens_total", (), self._prompt_tokens))
        samples.append(MetricSample("vllm:generation_tokens_total", (), self._generation_tokens))
        samples += [MetricSample("vllm:request_success_total", (("finished_reason", r),), n) for r, n in self._ends.items()]
        return samples


def render(status: ClusterStatus | None, model_name: str) -> bytes:
    """The cluster in Prometheus' text format; every sample carries model_name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status, model_name))
    return generate_latest(registry)


class _Status(Collector):
    def __init__(self, status: ClusterStatus | None, model_name: str) -> None:
        self._status = status
        self._model = ("model_name", model_name)

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("rayline:scheduler_up", [((), float(self._status is not None))])
        if self._status is None:
            return
        yield from self._gauges(self._status)
        yield from self._totals(self._status.metrics)

    def _gauges(self, status: ClusterStatus) -> Iterator[Metric]:
        def of_engines(name: str, values: Iterable[float], *more: tuple[_Labels, float]) -> Metric:
            labels = [(("engine", engine.engine),) for engine in status.engines]
            return self._gauge(name, [*zip(labels, values, strict=True), *more])

        engines = status.engines
        queue = ((("engine", "queue"),), float(status.queued))
        yield of_engines("vllm:num_requests_running", [e.stats.running for e in engines])
        yield of_engines("vllm:num_requests_waiting", [e.stats.waiting for e in engines], queue)
        yield of_engines("vllm:kv_cache_usage_perc", [_ratio(e.stats.blocks_used, e.stats.blocks_total) for e in engines])
        yield of_engines("rayline:kv_waste_ratio", [_waste(e) for e in engines])
        yield of_engines("rayline:kv_slots_shared", [e.stats.slots_shared for e in engines])
        yield of_engines(
            "rayline:kv_host_usage_ratio", [_ratio(e.stats.host_blocks_used, e.stats.host_blocks_total) for e in engines]
        )
        yield of_engines("rayline:plans_in_flight", [e.stats.in_flight for e in engines])
        yield of_engines("rayline:engine_ready", [e.ready for e in engines])
        yield of_engines("rayline:engine_epoch", [e.epoch for e in engines])

    def _gauge(self, name: str, samples: Iterable[tuple[_Labels, float]]) -> Metric:
        family = GaugeMetricFamily(name, HELP[name])
        for labels, value in samples:
            family.add_sample(name, self._labels(labels), value)
        return family

    def _totals(self, samples: Sequence[MetricSample]) -> Iterator[Metric]:
        """Families of what was counted: with buckets a histogram, else a counter."""
        histograms = {sample.name.removesuffix("_bucket") for sample in samples if sample.name.endswith("_bucket")}
        members: dict[str, list[MetricSample]] = defaultdict(list)
        for sample in samples:
            stem = sample.name.rpartition("_")[0]
            members[stem if stem in histograms else sample.name.removesuffix("_total")].append(sample)
        for name, group in members.items():
            help_text = HELP.get(name, name)
            if name in histograms:
                family: Metric = HistogramMetricFamily(name, help_text)
                for sample in sorted(group, key=_bucket_order):
                    family.add_sample(sample.name, self._labels(sample.labels), sample.value)
            else:
                family = CounterMetricFamily(name, help_text)
                for sample in group:
                    family.add_sample(f"{name}_total", self._labels(sample.labels), sample.value)
            yield family

    def _labels(self, labels: _Labels) -> dict[str, str]:
        return dict((self._model, *labels))


def _bucket_order(sample: MetricSample) -> tuple[list[tuple[str, str]], bool, float]:
    """Series by series, buckets by rising bound, then count and sum."""
    labels = dict(sample.labels)
    bound = labels.pop("le", None)
    return sorted(labels.items()), bound is None, float(bound or 0)


def _waste(engine: EngineStatus) -> float:
    return 1 - _ratio(engine.stats.slots_used, engine.stats.slots_allocated) if engine.stats.slots_allocated else 0.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
