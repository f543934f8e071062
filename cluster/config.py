"""What a user can set, resolved once and never changed afterwards.

Names are those of the command line and of the YAML file alike (`--max-model-len` is `max_model_len`). An unknown key, a wrong type
or a value out of range raises ConfigError, whose text is one clear line.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
Device = Literal["auto", "cpu", "cuda"]
Batching = Literal["continuous", "static", "static-skip"]
Reservation = Literal["paged", "max_tokens", "contiguous"]
PrefixCache = Literal["on", "off"]
PrefixSharing = Literal["all", "api_key"]
Kernels = Literal["auto", "native", "torch", "reference"]
RunAhead = Literal["auto", "on", "off"]
HAProxy = Literal["auto", "on", "off"]
Speculative = Literal["off", "lookup", "draft"]
SpeculativePace = Literal["adaptive", "fixed"]
SpeculativeAcceptance = Literal["coupled", "rejection"]
PlacementPolicy = Literal["prefix", "least_loaded", "round_robin"]

_EDGE = frozenset(
    (
        *("name", "route_prefix", "host", "port", "grpc_port", "haproxy", "routers"),
        *("served_model_name", "request_timeout_s", "prefix_sharing"),
    )
)
"""Settings that only routers and Serve work by."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class ConfigError(ValueError):
    """A setting, a model directory or a machine that cannot work, said in one line."""


@dataclass(frozen=True)
class BatchConfig:
    """What the Batcher and the KV manager work by: the part of the settings that has no model and no machine in it."""

    num_blocks: int
    """Blocks in the pool, the null block (id 0, never given to a sequence) included."""
    max_model_len: int
    """Longest sequence in tokens, prompt and output together."""
    block_size: int = 16
    max_num_seqs: int = 64
    """Most sequences in the running set, over all plans in flight."""
    max_num_batched_tokens: int = 512
    """Most tokens of one iteration."""
    pp: int = 1
    """Pipeline stages."""
    plans_in_flight: int | None = None
    """Default: as many as stages (ORCA, section 4.2)."""
    run_ahead: RunAhead = "off"
    """See Config; where workers keep the tokens they draw."""
    speculative_tokens: int = 0
    """Most tokens proposed for a sequence at a time. 0: none."""
    speculative_pace: SpeculativePace = "adaptive"
    """See Config."""
    batching: Batching = "continuous"
    reservation: Reservation = "paged"
    prefix_cache: PrefixCache = "on"
    """See keeps_prefixes."""
    host_blocks: int = 0
    """Slots in host memory for evicted blocks of the prefix cache."""

    def __post_init__(self) -> None:
        _at_least_one(self, "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "pp")
        if self.num_blocks < 2:
            raise ConfigError(f"num_blocks is {self.num_blocks}, but a pool needs the null block and at least one more")
        _check_budget(self)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether KV outlives its sequences. Not with the baselines: reserved blocks are not shared, and a static batch computes
        finished rows again, in blocks that others would read by then."""
        return self.prefix_cache == "on" and self.reservation == "paged" and self.batching == "continuous"

    @property
    def shares(self) -> int:
        """How many plans the decodes are divided among; so many may be in flight, and one more that runs ahead."""
        return self.plans_in_flight or self.pp

    @property
    def may_run_ahead(self) -> bool:
        """Whether a plan may hold decodes whose token the plan before it still draws."""
        alone = self.pp == 1 and self.plans_in_flight is None and self.speculative_tokens == 0
        return self.run_ahead != "off" and alone and self.batching == "continuous"

    @property
    def pool_tokens(self) -> int:
        """Slots that sequences can use."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that fits both the model and the pool."""
        return min(self.max_model_len, self.pool_tokens)


@dataclass(frozen=True)
class Config:
    """All settings of `rayline serve`, `rayline generate` and `LLM`."""

    model: str
    """Local Hugging Face directory, or a hub id."""
    served_model_name: str | None = None
    """The name clients use; the model's last path component where absent."""
    revision: str | None = None
    dtype: Dtype = "auto"
    quantization: str | None = None
    """Of linears while they are loaded: int8, int4-g128, fp8 (with -asym, -dynamic), or a recipe as lm_head: bf16, layers.0-1:
    int8, rest: int4. Default: as in the checkpoint."""
    device: Device = "auto"
    tp: int = 1
    """Tensor parallelism: ranks that share every layer."""
    pp: int = 1
    """Pipeline parallelism: stages of layers."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage, written 7,7,6. Default: balanced by cost, the lm_head counted."""
    plans_in_flight: int | None = None
    """Default: as many as stages. One more hides the engine's own time where stages are fast, with fewer sequences in each plan."""
    engines: int = 1
    """Copies of the model, each with its own workers."""
    routers: int = 1
    """Serve replicas of the router."""
    name: str = "rayline"
    """Of the Serve application that `rayline serve` runs; two with different names and prefixes can share a cluster."""
    route_prefix: str = "/"
    """Path below which this application answers, for `rayline serve`."""
    host: str = "0.0.0.0"
    port: int = 8000
    grpc_port: int = 9000
    """Of the gRPC interface, on all addresses of the machine whatever host says; 0: none."""
    haproxy: HAProxy = "auto"
    """For `rayline serve` where it starts Ray itself: HAProxy in place of Serve's proxy, for a fraction of its CPU time. Its
    metrics and state are then open on all addresses of the machine. auto: where host is all of them too."""
    max_model_len: int | None = None
    """Default: what the model's config allows, cut to what the pool holds."""
    kv_memory: int | None = None
    """Bytes for the paged KV pool of one worker (written 4GiB, 512MiB, 2000000). Default: a share of what is free."""
    kv_dtype: KVDtype = "auto"
    """What keys and values are kept in: auto is the dtype that is computed in. int8 and fp8 take a byte a number and two or four a
    vector: nearly twice the tokens of bfloat16 in the same memory, for a little accuracy."""
    host_kv_memory: int = 0
    """Bytes of each worker's host memory (written as kv_memory is) to which KV goes that the prefix cache evicts from the pool, and
    from where it is brought back when it is needed. 0: it is lost."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    speculative: Speculative = "off"
    """Tokens are proposed for each sequence and verified together: the same tokens in fewer iterations. lookup: what followed the
    last few tokens where the sequence had them before (prompt lookup, Saxena 2023). draft: what draft_model draws."""
    draft_model: str | None = None
    """A small model of the same vocabulary: a directory or hub id. Only the rank that draws loads it, whole."""
    draft_revision: str | None = None
    """As revision, of the draft model."""
    draft_quantization: str | None = None
    """As quantization, of the draft model."""
    speculative_tokens: int = 4
    """Most tokens proposed for a sequence at a time."""
    speculative_pace: SpeculativePace = "adaptive"
    """adaptive: fewer tokens, down to none, where they do not stand often enough to pay. fixed: always speculative_tokens."""
    speculative_acceptance: SpeculativeAcceptance = "coupled"
    """Which proposals of sampled requests stand. coupled: those that the target draws itself, so the tokens are those without.
    rejection (Leviathan et al. 2023): a few more; tokens of the same distribution, but not the same ones."""
    run_ahead: RunAhead = "auto"
    """Whether an iteration is planned and sent while the one before it runs, each decode's token still being drawn: then workers
    need not wait for the engine, but a new request waits an iteration longer, and a choice that a stop token ends is computed once
    too often. auto: while iterations take less than 10 ms. For one rank without speculation: else it is off."""
    batching: Batching = "continuous"
    reservation: Reservation = "paged"
    prefix_cache: PrefixCache = "on"
    """Whether KV outlives its sequences, to be shared by later ones that begin with the same tokens; never with the baselines of
    batching and reservation."""
    prefix_sharing: PrefixSharing = "all"
    """Who shares cached prefixes: all requests of one cache_salt, or of these only those with one API key (the header, or gRPC
    metadata, `authorization`), so that nobody learns from the time an answer takes what another tenant has asked."""
    threads: int | None = None
    """CPU threads of one worker. Default: the cores there are, shared among this node's workers."""
    placement: PlacementPolicy = "prefix"
    """Of several engines: the one that has most of the prompt and least to do, the least loaded one, or each in turn."""
    kv_pull: Literal["on", "off"] = "on"
    """Whether an engine that lacks a prefix takes its KV from one that has it, where that is quicker than to compute it. Of several
    engines, and where requests are placed by prefixes."""
    kv_pull_timeout_s: float = 5.0
    """KV that has not come within so long is computed."""
    max_queue: int = 1024
    """Requests waiting for an engine, cluster-wide; the next one is answered 429."""
    request_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    """A step without result for so long means the workers hang: the epoch ends. It bounds every exchange between ranks too."""
    worker_timeout_s: float = 8.0
    """A worker that has not answered for so long is taken for frozen, cut off or dead: the epoch ends."""
    load_timeout_s: float = 600.0
    timeline: str | None = None
    """File to which each engine appends when its stages computed which plan, on its node; python -m bench.timeline draws it."""
    kernels: Kernels = "auto"
    """What computes on a CPU: native (C++ kernels, built at the first start, for float32 and bfloat16), torch, or reference (torch
    with the attention that the others are tested against). Default: native where it can be, else torch."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty: name a directory or a hub id")
        numbers = ("tp", "pp", "engines", "routers", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_queue")
        _at_least_one(self, *numbers)
        _check_budget(self)
        for name in ("max_model_len", "kv_memory", "threads", "plans_in_flight"):
            if getattr(self, name) is not None:
                _at_least_one(self, name)
        if self.host_kv_memory < 0:
            raise ConfigError(f"host_kv_memory is {self.host_kv_memory}, but must be at least 0")
        if self.host_kv_memory and not self._keeps_prefixes:
            raise ConfigError(
                "host_kv_memory is for KV of the prefix cache, but prefix_cache, batching or reservation switch that off"
            )
        for name in ("request_timeout_s", "step_timeout_s", "worker_timeout_s", "load_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be above 0")
        if not 0.1 <= self.kv_pull_timeout_s <= 3600:
            raise ConfigError(f"kv_pull_timeout_s is {self.kv_pull_timeout_s}, but must be from 0.1 to 3600")
        plain = self.plans_in_flight is None and self.batching == "continuous" and self.speculative == "off"
        if self.run_ahead == "on" and not (plain and self.tp * self.pp == 1):
            raise ConfigError(
                "run_ahead is for one rank, continuous batching without speculation, and no set number of plans in flight"
            )
        if not 1 <= self.speculative_tokens <= 32:
            raise ConfigError(f"speculative_tokens is {self.speculative_tokens}, but must be from 1 to 32")
        if (self.draft_model is not None) != (self.speculative == "draft"):
            raise ConfigError("speculative draft and draft_model go together")
        for name in ("draft_revision", "draft_quantization"):
            if getattr(self, name) is not None and self.draft_model is None:
                raise ConfigError(f"{name} is for a draft_model")
        if self.speculative != "off" and self.batching != "continuous":
            raise ConfigError("speculation is for continuous batching")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but ports go from 1 to 65535")
        if self.stage_layers is not None and len(self.stage_layers) != self.pp:
            raise ConfigError(f"stage_layers names {len(self.stage_layers)} stages, but pp is {self.pp}")
        if not 0 <= self.grpc_port <= 65535:
            raise ConfigError(f"grpc_port is {self.grpc_port}, but ports go from 0 to 65535")
        if self.grpc_port == self.port:
            raise ConfigError(f"grpc_port and port are both {self.port}, but each needs a port of its own")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"name is '{self.name}', but must be letters, digits, '.', '_' and '-'")
        if not re.fullmatch(r"/|(/[A-Za-z0-9._~-]+)+", self.route_prefix):
            raise ConfigError(f"route_prefix is '{self.route_prefix}', but must be / or begin and not end with it, as in /v2")

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def by_prefix(self) -> bool:
        """Whether requests are placed by the KV that engines have, of which the scheduler must be told."""
        return self.placement == "prefix" and self.engines > 1 and self._keeps_prefixes

    @property
    def _keeps_prefixes(self) -> bool:
        return batch_settings(self, num_blocks=2, max_model_len=1).keeps_prefixes

    @property
    def max_beams(self) -> int:
        """The widest beam search that an engine can run; 0 where its sequences can't share KV."""
        return self.max_num_seqs if self.batching == "continuous" and self.reservation == "paged" else 0

    @property
    def pulls(self) -> bool:
        """Whether engines take KV from each other."""
        return self.kv_pull == "on" and self.by_prefix

    @property
    def num_ranks(self) -> int:
        """Workers of one engine."""
        return self.tp * self.pp

    @property
    def digest(self) -> str:
        """Of all settings that scheduler and engines work by: equal for two configurations that can share them."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in _EDGE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Config of plain values (YAML, command line), each checked against its field's type."""
    hints = get_type_hints(Config)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting '{unknown[0]}'; known are: {', '.join(sorted(hints))}")
    if values.get("model") is None:
        raise ConfigError("model is missing")
    checked = {name: _check(name, value, hints[name]) for name, value in values.items() if value is not None}
    return Config(**checked)


def parse_bytes(text: str | int) -> int:
    """'4GiB', '512MB', '1.5g' or a plain number as bytes."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise ConfigError(f"'{text}' is no amount of memory; write 4GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_counts(value: object) -> tuple[int, ...]:
    """'7,7,6' or a list of numbers, each at least 1."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        counts = tuple(int(part) for part in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        counts = ()
    if not counts or min(counts) < 1:
        raise ConfigError(f"stage_layers is {value!r}, but must be numbers of at least 1, written 7,7,6")
    return counts


def batch_settings(config: Config, num_blocks: int, max_model_len: int, host_blocks: int = 0) -> BatchConfig:
    """The Batcher's part of `config`, for a pool of `num_blocks` blocks, sequences of at most `max_model_len` tokens, and
    `host_blocks` slots in host memory."""
    shared = {field.name for field in dataclasses.fields(BatchConfig)} & {field.name for field in dataclasses.fields(Config)}
    values = {name: getattr(config, name) for name in shared if name != "max_model_len"}
    if config.speculative == "off":
        values["speculative_tokens"] = 0
    if config.tp * config.pp > 1:  # who draws tells the others only through the engine
        values["run_ahead"] = "off"
    return BatchConfig(num_blocks=num_blocks, max_model_len=max_model_len, host_blocks=host_blocks, **values)


def _check(name: str, value: Any, hint: Any) -> Any:
    if name in ("kv_memory", "host_kv_memory") and isinstance(value, str):
        return parse_bytes(value)
    if name == "stage_layers":
        return parse_counts(value)
    allowed = [hint] if get_origin(hint) is Literal else [part for part in get_args(hint) or (hint,) if part is not type(None)]
    for part in allowed:
        if get_origin(part) is Literal:
            if isinstance(value, bool) and "on" in get_args(part):  # YAML reads on and off so
                value = "on" if value else "off"
            if value in get_args(part):
                return value
            raise ConfigError(f"{name} is '{value}'; choose one of {', '.join(map(str, get_args(part)))}")
        if part is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, part) and not isinstance(value, bool):
            return value
    wanted = " or ".join(part.__name__ for part in allowed)
    raise ConfigError(f"{name} is {value!r}, but must be {wanted}")


def _check_budget(config: "Config | BatchConfig") -> None:
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_seqs ({config.max_num_seqs}): "
            "an iteration holds one token of every decoding sequence"
        )


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, but must be at least 1")
