"""What is told of proposals: by position in /metrics."""

from cluster.engine_metrics import EngineMetrics
from cluster.running import Counters


def counted(name: str, counters: Counters) -> dict[str, float]:
    samples = EngineMetrics(batches=counters).samples("e")
    return {dict(sample.labels)["position"]: sample.value for sample in samples if sample.name == name}


def test_acceptance_is_counted_by_position() -> None:
    first, second = Counters(), Counters()
    for proposed, stood in ((3, 3), (3, 1), (1, 0)):
        first.count_verified(proposed, stood)
    second.count_verified(4, 2)
    total = first + second
    assert (total.verified, total.proposed, total.accepted) == (4, 11, 6)
    assert counted("vllm:spec_decode_num_accepted_tokens_per_pos_total", total) == {"0": 3, "1": 2, "2": 1}
    assert counted("rayline:spec_decode_num_tried_tokens_per_pos_total", total) == {"0": 4, "1": 3, "2": 2}
    assert counted("vllm:spec_decode_num_accepted_tokens_per_pos_total", Counters()) == {}
