"""What an engine counts."""

from dataclasses import dataclass, field

from cluster.protocol import MetricSample
from cluster.pulls import PullCounts
from cluster.running import Counters


@dataclass
class EngineMetrics:
    """Running totals of an engine's process."""

    steps: int = 0
    tokens_computed: int = 0
    batches: Counters = field(default_factory=Counters)
    epochs: int = 0
    stage_seconds: dict[int, float] = field(default_factory=dict)
    """By stage: how long its leader computed."""
    pulls: PullCounts = field(default_factory=PullCounts)
    channel: list[MetricSample] = field(default_factory=list)
    """Of its mailbox, which the process around it owns."""

    def samples(self, engine: str) -> list[MetricSample]:
        """As MetricSamples."""
        labels = (("engine", engine),)
        return [
            MetricSample("rayline:iterations_total", labels, float(self.steps)),
            MetricSample("rayline:computed_tokens_total", labels, float(self.tokens_computed)),
            MetricSample("vllm:num_preemptions_total", labels, float(self.batches.preemptions)),
            MetricSample("vllm:prefix_cache_queries_total", labels, float(self.batches.looked_up)),
            MetricSample("vllm:prefix_cache_hits_total", labels, float(self.batches.cached)),
            MetricSample("rayline:kv_host_stored_blocks_total", labels, float(self.batches.stored)),
            MetricSample("rayline:kv_host_loaded_blocks_total", labels, float(self.batches.loaded)),
            MetricSample("vllm:spec_decode_num_drafts_total", labels, float(self.batches.verified)),
            MetricSample("vllm:spec_decode_num_draft_tokens_total", labels, float(self.batches.proposed)),
            MetricSample("vllm:spec_decode_num_accepted_tokens_total", labels, float(self.batches.accepted)),
            *self._positions(labels),
            MetricSample("rayline:engine_epochs_total", labels, float(self.epochs)),
            *(
                MetricSample("rayline:stage_compute_seconds_total", (*labels, ("stage", str(stage))), seconds)
                for stage, seconds in sorted(self.stage_seconds.items())
            ),
            *self._pulls(labels),
            *self.channel,
        ]

    def _positions(self, labels: tuple[tuple[str, str], ...]) -> list[MetricSample]:
        """accepted / tried is the share that stands where all before it do: proposals differ in length, so both are needed."""
        names = {"vllm:spec_decode_num_accepted_tokens": "accepted_at", "rayline:spec_decode_num_tried_tokens": "tried_at"}
        return [
            MetricSample(f"{name}_per_pos_total", (*labels, ("position", str(at))), float(getattr(self.batches, counted)[at]))
            for name, counted in names.items()
            for at in sorted(self.batches.tried_at)
        ]

    def _pulls(self, labels: tuple[tuple[str, str], ...]) -> list[MetricSample]:
        counts = self.pulls
        if not counts.ended and not counts.loans:
            return []
        return [
            *(
                MetricSample("rayline:kv_pulls_total", (*labels, ("outcome", outcome)), float(count))
                for outcome, count in sorted(counts.ended.items())
            ),
            MetricSample("rayline:kv_pulled_tokens_total", labels, float(counts.tokens)),
            MetricSample("rayline:kv_pull_seconds_total", labels, counts.seconds),
            MetricSample("rayline:kv_loans_total", labels, float(counts.loans)),
        ]
