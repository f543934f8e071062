"""Messages and settings for tests of one state machine at a time, with defaults for what does not matter."""

from cluster.config import BatchConfig
from cluster.protocol import (
    ChunkResult,
    ClusterStatus,
    Credit,
    EngineReport,
    EngineStats,
    EngineStatus,
    MetricSample,
    Place,
    PromptScores,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenLogprobs,
    WorkerReady,
)

BATCH = BatchConfig(num_blocks=17, max_model_len=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, prefix_cache="off")


def request(
    id: str = "r",
    prompt: int = 4,
    max_tokens: int = 4,
    n: int = 1,
    attempt: int = 0,
    emitted: int = 0,
    deadline_s: float | None = None,
) -> Request:
    return Request(
        id=id,
        attempt=attempt,
        reply_to="router",
        prompt=list(range(prompt)),
        emitted=[list(range(emitted)) for _ in range(n)],
        finished=[False] * n,
        params=SamplingParams(seed=1, max_tokens=max_tokens, n=n),
        deadline_s=deadline_s,
    )


def result(plan: StepPlan, token: int = 7, error: str | None = None) -> StepResult:
    """What workers answer that always draw `token`."""
    drawn = [ChunkResult(chunk.seq, [token], []) for chunk in plan.chunks if chunk.sample]
    asked = [(chunk.seq, *chunk.scores) for chunk in plan.chunks if chunk.scores is not None]
    told = [PromptScores(seq, first, [TokenLogprobs(-float(i), [], []) for i in range(first, end)]) for seq, first, end in asked]
    return StepResult(epoch=plan.epoch, step=plan.step, results=drawn, error=error, scores=told)


def ready(epoch: int, rank: int = 0, num_blocks: int = 17, host_blocks: int = 0) -> WorkerReady:
    address = f"w{rank}"
    return WorkerReady(epoch=epoch, rank=rank, address=address, num_blocks=num_blocks, max_model_len=64, host_blocks=host_blocks)


def place(
    id: str = "r",
    attempt: int = 0,
    tokens: int = 4,
    longest: int = 8,
    sequences: int = 1,
    arrival: float = 0.0,
    deadline_s: float | None = None,
    reply_to: str = "router",
) -> Place:
    return Place(
        request=id,
        attempt=attempt,
        reply_to=reply_to,
        num_tokens=tokens,
        longest=longest,
        sequences=sequences,
        arrival=arrival,
        deadline_s=deadline_s,
    )


def report(
    engine: str = "e",
    epoch: int = 1,
    number: int = 1,
    tokens: int = 64,
    sequences: int = 4,
    ready: bool = True,
    longest: int = 64,
    accepted: list[tuple[str, int]] | None = None,
    metrics: list[MetricSample] | None = None,
) -> EngineReport:
    return EngineReport(
        engine=engine,
        epoch=epoch,
        number=number,
        address=f"{engine}!",
        ready=ready,
        reason="" if ready else "loading",
        credit=Credit(tokens, sequences),
        capacity=Credit(64, 4),
        max_sequence_tokens=longest if ready else 0,
        accepted=accepted or [],
        stats=EngineStats(),
        metrics=metrics or [],
    )


def status(**epochs: int) -> ClusterStatus:
    engines = [EngineStatus(name, epoch, True, 64, EngineStats()) for name, epoch in epochs.items()]
    return ClusterStatus(engines, 0, [])


def delta(
    id: str = "r", attempt: int = 0, index: int = 0, tokens: tuple[int, ...] = (1,), choice: int = 0, end: bool = False
) -> TokenDelta:
    return TokenDelta(
        request=id, attempt=attempt, choice=choice, index=index, tokens=list(tokens), finish="length" if end else None
    )
