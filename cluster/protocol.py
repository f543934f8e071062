"""Every message that crosses a process boundary. Structs only: no behaviour, no I/O.

Wire format: msgpack, written by msgspec. A message is an array whose first element is the name of its type, so any msgpack reader
can follow a captured frame; fields follow in the order they stand here (structs inside a message are arrays of their fields alone).
New fields go last and have a default. Between two live processes messages arrive in order and none is lost (cluster/channel.py).

Vocabulary
    request    what a client asked for; lives in the router that took it, under a cluster-wide unique id
    attempt    how often the request was submitted; the router raises it when an engine dies under the request
    choice     one of a request's n outputs
    sequence   (request, choice) as an engine schedules it; `seq` is its engine-local number, never used twice
    epoch      one life of an engine's set of workers; messages of an earlier epoch are dropped
    step       one iteration; steps of an epoch are numbered from 0 and executed in order by every stage
"""

from typing import Literal

from cluster.structs import Struct

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Wire(Struct, array_like=True):
    """Base of all structs below. Treated as immutable once sent or received."""


# --- requests: router -> engine ------------------------------------------------------------------------------------


class SamplingParams(Wire, kw_only=True):
    """How to choose tokens. All defaults mean "off" but for temperature, which is 1 as in OpenAI's interface.

    The order of application: repetition, presence and frequency penalties and logit_bias on the fp32 logits, then the ban of
    stop_token_ids as long as min_tokens asks for it, then temperature, then top_k, top_p and min_p as filters, then arg-max of what
    is left plus Gumbel noise. temperature 0 is greedy: the arg-max after penalties, bias and ban, without filters or noise.
    """

    seed: int = 0
    """Unsigned 64 bit. Drawn by the router where the user gave none, so that a later attempt draws the same noise."""
    max_tokens: int = 16
    """At most so many generated tokens per choice, those of earlier attempts included."""
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (Keskar et al. 2019, CTRL): positive logits divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """None: no log-probabilities. k >= 0: that of the chosen token and of the k most likely ones."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a choice (end-of-sequence ids included by the router, unless ignore_eos). They are emitted as its last."""
    prompt_logprobs: int | None = None
    """As logprobs, of the prompt's own tokens, the first excepted: nothing comes before it. max_tokens may then be 0."""
    min_tokens: int = 0
    """Until so many tokens of a choice were generated, its stop tokens can't be drawn, nor does a stop string end it."""


class Request(Wire, kw_only=True):
    """One attempt at a request."""

    id: str
    attempt: int
    reply_to: str
    """Address of the router's mailbox: where deltas go."""
    prompt: list[int]
    emitted: list[list[int]]
    """Per choice the tokens already delivered by earlier attempts: not prompt, but not computed again as output either."""
    finished: list[bool]
    """Per choice: it had already ended in an earlier attempt (or by a stop string) and isn't run again."""
    params: SamplingParams
    deadline_s: float | None = None
    """Seconds from receipt after which nobody waits for the answer."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    scored: int = 1
    """With params.prompt_logprobs: those of the prompt positions before this one were delivered by earlier attempts."""


class Submit(Wire, tag=True):
    """Router -> engine: run this. The engine must have been named in a Placement of the same attempt."""

    epoch: int
    request: Request


class Cancel(Wire, tag=True, kw_only=True):
    """Router -> engine: nobody waits for these choices any more (client gone, stop string found, deadline passed)."""

    request: str
    attempt: int
    choices: list[int]


# --- tokens: engine -> router --------------------------------------------------------------------------------------


class TokenLogprobs(Wire):
    """Log-probabilities under the model's own distribution: before penalties, bias, temperature and filters."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int | None = None
    """1 for the likeliest token, equal ones sharing a rank. Of prompt tokens only."""


class TokenDelta(Wire, kw_only=True):
    """News of one choice: tokens [index, index + len(tokens)) of its output."""

    request: str
    attempt: int
    choice: int
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] = []
    """As long as tokens where the request asked for them, else empty."""
    finish: FinishReason | None = None
    queued_s: float | None = None
    """With the first delta of a choice: seconds from receipt by the engine to its first launched plan."""
    prompt_index: int = 0
    prompt_logprobs: list[TokenLogprobs] = []
    """News of the request rather than of the choice: prompt positions [prompt_index, prompt_index + len(prompt_logprobs))."""
    cached_tokens: int | None = None
    """With the first delta of a choice: tokens of the prompt whose KV was there already when it first ran."""


class Deltas(Wire, tag=True):
    """Engine -> router: all that one step gave for the requests of that router."""

    engine: str
    epoch: int
    deltas: list[TokenDelta]


class Released(Wire, tag=True):
    """Engine -> router: these (request, attempt) are no longer run here and did not end. Place them again."""

    engine: str
    epoch: int
    requests: list[tuple[str, int]]
    reason: str
    suspects: list[str] = []
    """Of these, the requests that were in a plan when it failed: one of them may be what made it fail."""


class Rejected(Wire, tag=True):
    """Engine -> router: this attempt can never run here (larger than the pool, say)."""

    request: str
    attempt: int
    reason: str


# --- placement: router <-> global scheduler ------------------------------------------------------------------------


class Place(Wire, tag=True, kw_only=True):
    """Router -> scheduler: find an engine. Carries the size, never the tokens."""

    request: str
    attempt: int
    reply_to: str
    num_tokens: int
    """What has to be computed before the next new token: the prompt, and per choice the tokens emitted so far."""
    longest: int
    """The most tokens one of its sequences can come to."""
    sequences: int
    """Choices still to run."""
    arrival: float
    """Scheduler-independent order of arrival: the router's unix time when the client's request came."""
    deadline_s: float | None = None
    names: bytes = b""
    """Of the prompt's whole blocks, joined (kv/names.py), where placement goes by prefixes."""


class Withdraw(Wire, tag=True):
    """Router -> scheduler: no longer wanted."""

    request: str
    attempt: int


class Placement(Wire, tag=True):
    """Scheduler -> router: submit this attempt to that engine."""

    request: str
    attempt: int
    engine: str
    epoch: int
    address: str
    waited_s: float


class Refusal(Wire, tag=True):
    """Scheduler -> router: not placed."""

    request: str
    attempt: int
    reason: Literal["queue_full", "too_large", "deadline"]
    retry_after_s: float = 0.0


class RouterHello(Wire, tag=True):
    """Router -> scheduler, at start and every heartbeat: I exist, and so far I counted this."""

    router: str
    metrics: "list[MetricSample]"
    leaving: bool = False
    """Its last word: it has ended in order."""


class EngineDown(Wire, tag=True):
    """Scheduler -> every router, and an engine that was wrongly taken for dead: epochs up to and with `epoch` are over."""

    engine: str
    epoch: int


class RouterDown(Wire, tag=True):
    """Scheduler -> every engine: this router is gone; nobody waits for its requests."""

    router: str


class PlaceAgain(Wire, tag=True):
    """Scheduler -> a router it did not know, or had taken for dead: none of its requests are queued here."""


class Stop(Wire, tag=True):
    """Scheduler -> every router: the server ends. End all requests, take no more."""


class ClusterStatus(Wire, tag=True):
    """Scheduler -> every router, each heartbeat and on change: what /health, /metrics and /v1/models speak from."""

    engines: "list[EngineStatus]"
    queued: int
    metrics: "list[MetricSample]"
    """Summed over the cluster, those of processes that are gone included."""


# --- engine -> global scheduler ------------------------------------------------------------------------------------


class Credit(Wire):
    """What an engine can take right now, beyond all it has accepted."""

    tokens: int
    sequences: int


class EngineReport(Wire, tag=True, kw_only=True):
    """Engine -> scheduler: on change of its credit (at most once a step) and every heartbeat."""

    engine: str
    epoch: int
    number: int
    """Counts up within (engine, epoch); an older one than the last seen is dropped."""
    address: str
    ready: bool
    reason: str
    """Why it is not ready."""
    credit: Credit
    capacity: Credit
    """The credit of an idle engine."""
    max_sequence_tokens: int
    """The longest sequence (prompt + output) this engine can ever hold."""
    accepted: list[tuple[str, int]]
    """(request, attempt) accepted since the last report: no longer to be subtracted from the credit."""
    stats: "EngineStats"
    metrics: "list[MetricSample]"
    cache_changes: int = 0
    """How many CacheChanges of this epoch were sent before."""


class CacheChanges(Wire, tag=True, kw_only=True):
    """Engine -> scheduler, soon after a plan or an eviction: how its radix tree has changed."""

    engine: str
    epoch: int
    number: int
    """Counts up from 0 within (engine, epoch); where one is missing, CacheResync is the answer."""
    changes: list[tuple[bool, bytes]]
    """(added or removed, names of blocks, joined), in order."""
    whole: bool = False
    """These are all blocks there are, whatever was said before."""


class CacheResync(Wire, tag=True):
    """Scheduler -> engine: changes of this epoch are missing; send the whole."""

    engine: str
    epoch: int


class EngineStats(Wire, kw_only=True):
    """A gauge reading of one engine."""

    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    slots_allocated: int = 0
    slots_used: int = 0
    slots_shared: int = 0
    blocks_cached: int = 0
    """Besides blocks_used: kept for requests to come, given up where there is need."""
    backlog: int = 0
    """Tokens of prompts, known and neither computed, nor in a launched plan, nor in the prefix cache when they came."""


class EngineStatus(Wire):
    """One engine as the scheduler sees it."""

    engine: str
    epoch: int
    ready: bool
    max_sequence_tokens: int
    stats: EngineStats
    reason: str = ""
    """Why it is not ready."""


class MetricSample(Wire):
    """A counter's or a histogram bucket's running total: (Prometheus name, sorted label pairs, value)."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


# --- steps: engine <-> workers -------------------------------------------------------------------------------------


class NewSequence(Wire, kw_only=True):
    """All a worker must know of a sequence, sent once."""

    choice: int
    prompt: list[int]
    emitted: list[int]
    params: SamplingParams


class Admission(Wire):
    """A sequence enters (or, after a preemption, re-enters) the running set with this block table.

    The first `num_computed` positions of the table hold valid KV; `new` comes with the first admission only.
    """

    seq: int
    num_computed: int
    blocks: list[int]
    new: NewSequence | None = None


class Chunk(Wire):
    """Run positions [start, start + num_tokens) of a sequence: prefill, decode and verification alike."""

    seq: int
    start: int
    num_tokens: int
    new_blocks: list[int]
    """Appended to the block table before the chunk runs."""
    tokens: list[int]
    """Ids at the chunk's last len(tokens) positions, where a worker can't have them yet. Empty for prompts, which came with the
    sequence, and where the worker that samples is the one that embeds."""
    sample: bool
    """Draw a token from the logits of the last position."""
    scores: tuple[int, int] | None = None
    """[first, end): prompt positions whose log-probabilities are wanted; the logits one position before tell each of them."""


class StepPlan(Wire, tag=True, kw_only=True):
    """Engine -> first stage -> next stage ...: one iteration, as differences.

    Order of execution: drop `finished`, apply `admitted`, run `copies` in order, run `chunks` as one batch in the order given.
    """

    epoch: int
    step: int
    admitted: list[Admission]
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    """(source block, destination block), whole blocks, all layers."""
    finished: list[int]


class ChunkResult(Wire):
    """Of one chunk with `sample`: the tokens drawn (several only for verified drafts)."""

    seq: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]


class PromptScores(Wire):
    """Of one chunk with `scores`: the log-probabilities of its prompt positions, from `first` on."""

    seq: int
    first: int
    logprobs: list[TokenLogprobs]


class StepResult(Wire, tag=True, kw_only=True):
    """Last stage -> engine."""

    epoch: int
    step: int
    results: list[ChunkResult]
    compute_s: float = 0.0
    error: str | None = None
    """A worker's exception: the epoch is over."""
    scores: list[PromptScores] = []


# --- life-cycle of workers: engine <-> workers ---------------------------------------------------------------------


class WorkerReady(Wire, tag=True, kw_only=True):
    """Worker -> engine: weights and KV pool are in place."""

    epoch: int
    rank: int
    address: str
    num_blocks: int
    """How many blocks of the engine's block size this worker's pool holds, the null block included."""
    max_model_len: int


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


RouterMessage = Deltas | Released | Rejected | Placement | Refusal | EngineDown | PlaceAgain | Stop | ClusterStatus
SchedulerMessage = Place | Withdraw | RouterHello | EngineReport | CacheChanges
EngineMessage = (
    Submit | Cancel | RouterDown | EngineDown | CacheResync | StepResult | WorkerReady | WorkerFailed | Pong | StageTimes
)
WorkerMessage = StepPlan | Ping
