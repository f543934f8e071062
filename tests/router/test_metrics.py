"""What a Prometheus server reads from /metrics."""

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

from cluster.channel import Mailbox
from cluster.protocol import ClusterStatus, EngineStats, EngineStatus, MetricSample, PlaceAgain, RouterMessage
from router.generation import ChoiceDelta, Generation, Unavailable
from router.metrics import HELP, RouterMetrics, render
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Step, one_by_one

Key = tuple[str, tuple[tuple[str, str], ...]]


def read(text: bytes) -> dict[Key, float]:
    """Samples by name and labels, model_name checked and left out."""
    samples: dict[Key, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples


def cluster(metrics: list[MetricSample]) -> ClusterStatus:
    busy = EngineStats(
        running=3,
        waiting=2,
        in_flight=1,
        blocks_total=100,
        blocks_used=25,
        slots_allocated=400,
        slots_used=300,
        slots_shared=16,
        host_blocks_total=8,
        host_blocks_used=6,
    )
    engines = [
        EngineStatus(engine="a", epoch=2, ready=True, max_sequence_tokens=256, stats=busy),
        EngineStatus(engine="b", epoch=0, ready=False, max_sequence_tokens=256, stats=EngineStats()),
    ]
    return ClusterStatus(engines=engines, queued=7, metrics=metrics)


def test_gauges() -> None:
    samples = read(render(cluster([]), "tiny"))
    a, b, queue = ((("engine", name),) for name in ("a", "b", "queue"))
    assert samples["vllm:num_requests_running", a] == 3
    assert samples["vllm:num_requests_waiting", a] == 2
    assert samples["vllm:num_requests_waiting", queue] == 7
    assert samples["vllm:kv_cache_usage_perc", a] == 0.25
    assert samples["rayline:kv_waste_ratio", a] == 0.25
    assert (samples["rayline:kv_host_usage_ratio", a], samples["rayline:kv_host_usage_ratio", b]) == (0.75, 0)
    assert samples["rayline:kv_waste_ratio", b] == samples["vllm:kv_cache_usage_perc", b] == 0
    assert (samples["rayline:engine_ready", a], samples["rayline:engine_ready", b]) == (1, 0)
    assert read(render(None, "tiny")) == {("rayline:scheduler_up", ()): 0}


def test_histograms_and_counters() -> None:
    metrics = RouterMetrics()
    for seconds in (0.02, 0.021, 3000.0):
        metrics.first_token(seconds)
        metrics.prompt(10)
    metrics.queued(0.1)
    metrics.generated(5)
    metrics.finished("stop", 5, 1.0)
    metrics.finished("abort", 1, 1.0)
    preempted = MetricSample("vllm:num_preemptions_total", (("engine", "a"),), 4.0)
    with Mailbox[RouterMessage](RouterMessage, "127.0.0.1") as mailbox:
        mailbox.send("nonsense", PlaceAgain())
        channel = mailbox.samples("router")
    # Summing sorts by text: "+Inf" and "10.0" come before "2.5".
    shuffled = sorted([*metrics.samples(), preempted, *channel], key=lambda sample: (sample.name, sample.labels))
    text = render(cluster(shuffled), "tiny")
    samples = read(text)
    name = "vllm:time_to_first_token_seconds"
    buckets = [(labels[0][1], value) for (key, labels), value in samples.items() if key == f"{name}_bucket"]
    assert [float(bound) for bound, _ in buckets] == sorted(float(bound) for bound, _ in buckets)
    assert [value for _, value in buckets] == sorted(value for _, value in buckets)
    found = dict(buckets)
    assert (found["0.01"], found["0.02"], found["0.04"], found["2560.0"], found["+Inf"]) == (0, 1, 2, 2, 3)
    assert samples[f"{name}_count", ()] == 3
    assert abs(samples[f"{name}_sum", ()] - 3000.041) < 1e-9
    assert samples["vllm:prompt_tokens_total", ()] == 30
    assert samples["vllm:generation_tokens_total", ()] == 5
    assert samples["vllm:request_success_total", (("finished_reason", "stop"),)] == 1
    assert samples["vllm:request_success_total", (("finished_reason", "abort"),)] == 1
    assert samples["vllm:e2e_request_latency_seconds_count", ()] == 1, "only what was answered"
    assert samples["vllm:num_preemptions_total", (("engine", "a"),)] == 4
    dropped = {labels: value for (key, labels), value in samples.items() if key == "rayline:messages_dropped_total"}
    assert dropped == {(("direction", "in"), ("process", "router")): 0, (("direction", "out"), ("process", "router")): 1}
    types = {family.name: family.type for family in text_string_to_metric_families(text.decode())}
    assert types[name] == "histogram"
    assert types["vllm:prompt_tokens"] == types["vllm:num_preemptions"] == "counter"
    assert types["vllm:num_requests_running"] == "gauge"
    assert set(HELP) <= set(types)


def test_requests_are_counted(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        if generation.prompt == [99]:
            yield [ChoiceDelta(0, [50])]
            yield Unavailable("dead")
        yield from one_by_one([50, 51, 52], "stop", generation.params.n)

    api = Api(tokenizer, served, script)
    api.post("/v1/completions", prompt=[[5, 6], [7]], n=2)
    api.error("/v1/completions", prompt=[99])
    counted = {(sample.name, sample.labels): sample.value for sample in api.metrics.samples()}
    assert counted["vllm:prompt_tokens_total", ()] == 4
    assert counted["vllm:generation_tokens_total", ()] == 13
    assert counted["vllm:time_to_first_token_seconds_count", ()] == 3
    assert counted["vllm:inter_token_latency_seconds_count", ()] == 8
    assert counted["vllm:e2e_request_latency_seconds_count", ()] == 4
    assert counted["vllm:request_success_total", (("finished_reason", "stop"),)] == 4
    assert counted["vllm:request_success_total", (("finished_reason", "error"),)] == 1
    assert counted["vllm:request_prompt_tokens_count", ()] == 3
    api.generator.cluster = cluster(api.metrics.samples())
    response = api.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert read(response.content)["vllm:prompt_tokens_total", ()] == 4


def test_scored_prompts_are_counted_once(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, lambda generation: [[ChoiceDelta(c, [], finish="length")] for c in range(generation.params.n)])
    api.post("/v1/completions", prompt=[[5, 6], [7]], echo=True, max_tokens=0, n=2)
    counted = {(sample.name, sample.labels): sample.value for sample in api.metrics.samples()}
    assert counted["vllm:prompt_tokens_total", ()] == counted["vllm:request_prompt_tokens_sum", ()] == 3
    assert counted["vllm:request_prompt_tokens_count", ()] == 2
    assert counted["vllm:time_to_first_token_seconds_count", ()] == 0
