"""Output tokens per second on a pile of requests, against transformers' static `generate`.

    python -m bench.models DIRECTORY
    python -m bench.offline DIRECTORY/S [--repetitions 3] [--threads 2]

64 requests at once, prompts of 32 to 256 tokens, outputs of 16 to 128, greedy, end-of-sequence ignored. The peer takes them in
batches of 64, sorted by output length and padded on the left; its surplus tokens don't count. It runs in the dtype that is
faster for it here. Both sides run in this process in turn, repetition by repetition, after one warm-up each; prompts differ
between repetitions in tokens, not in shape, so that no cache carries over. CPU seconds stand beside wall seconds for machines
that others use too.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.offline import LLM
from cluster.protocol import SamplingParams

SEED = 1234
FIRST_ID, LAST_ID = 300, 31_900
"""Plain entries of the vocabulary: no special tokens, no single bytes."""


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: list[int]
    max_tokens: int


@dataclass
class Contender:
    """One side and what was measured of it."""

    name: str
    generate: Callable[[Sequence[Job]], list[list[int]]]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """One repetition."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.outputs = self.generate(jobs)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        if [len(tokens) for tokens in self.outputs] != [job.max_tokens for job in jobs]:
            raise RuntimeError(f"{self.name} did not give the number of tokens it was asked for")


def workload(repetition: int, requests: int = 64) -> list[Job]:
    """The same shapes every time, other tokens for every repetition."""
    shapes = random.Random(SEED)
    tokens = random.Random(f"{SEED} {repetition}")
    sizes = [(shapes.randint(32, 256), shapes.randint(16, 128)) for _ in range(requests)]
    return [Job([tokens.randint(FIRST_ID, LAST_ID) for _ in range(n)], most) for n, most in sizes]


def rayline(model: str, threads: int, dtype: str) -> Contender:
    """Our side: the whole engine in this process, default settings but for the length of sequences."""
    llm = LLM(model, dtype=dtype, threads=threads, max_model_len=512)

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        params = [SamplingParams(seed=0, max_tokens=job.max_tokens, temperature=0.0) for job in jobs]
        completions = llm.generate([job.prompt for job in jobs], params, ignore_eos=True)
        return [completion.outputs[0].token_ids for completion in completions]

    return Contender(f"rayline {str(llm.runner.pool.keys.dtype)[6:]}", generate)


def static_generate(model: str, dtype: str, batch: int) -> Contender:
    """The peer: transformers' generate() on padded batches."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded.generation_config.eos_token_id = None

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in jobs]
        order = sorted(range(len(jobs)), key=lambda i: jobs[i].max_tokens)
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            width, most = max(len(jobs[i].prompt) for i in some), max(jobs[i].max_tokens for i in some)
            ids = torch.tensor([[0] * (width - len(jobs[i].prompt)) + jobs[i].prompt for i in some])
            mask = torch.tensor([[0] * (width - len(jobs[i].prompt)) + [1] * len(jobs[i].prompt) for i in some])
            with torch.inference_mode():
                rows = loaded.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
            for i, row in zip(some, rows[:, width:].tolist(), strict=True):
                outputs[i] = row[: jobs[i].max_tokens]
        return outputs

    return Contender(f"transformers generate {dtype}", generate)


def faster_peer(model: str, batch: int) -> Contender:
    """The peer in whichever of fp32 and bf16 takes less CPU time for 64 x (32 + 4) tokens here."""
    jobs = [Job(job.prompt[:32], 4) for job in workload(0)]
    candidates = [static_generate(model, dtype, batch) for dtype in ("float32", "bfloat16")]
    for candidate in candidates:
        candidate.run(jobs[:1])
        candidate.run(jobs)
        print(f"trial: {candidate.name} took {candidate.cpu[-1]:.1f} CPU s for 64 x (32 + 4) tokens")
    best = min(candidates, key=lambda candidate: candidate.cpu[-1])
    return Contender(best.name, best.generate)


def report(contenders: Sequence[Contender], tokens: int) -> None:
    """The table and the ratio of the first contender to the second."""
    print(f"\n{'':34}{'tok/s median':>14}{'best':>8}{'wall s':>9}{'CPU s':>8}   walls")
    for c in contenders:
        middle, quickest = statistics.median(c.wall), min(c.wall)
        walls = " ".join(f"{wall:.1f}" for wall in c.wall)
        rates = f"{tokens / middle:14.0f}{tokens / quickest:8.0f}"
        print(f"{c.name:34}{rates}{middle:9.1f}{statistics.median(c.cpu):8.1f}   {walls}")
    ours, peer = contenders
    pairs = [theirs / own for own, theirs in zip(ours.wall, peer.wall, strict=True)]
    cpu = statistics.median(peer.cpu) / statistics.median(ours.cpu)
    same = sum(a == b for a, b in zip(ours.outputs, peer.outputs, strict=True))
    print(f"\n{statistics.median(pairs):.2f}x (median of pairwise ratios; by CPU time {cpu:.2f}x)")
    print(f"{same} of {len(ours.outputs)} outputs of the last repetition are the same, token for token")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto", help="ours")
    parser.add_argument("--peer-dtype", default="faster", choices=["faster", "float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=64, help="the peer's")
    parser.add_argument("--no-warmup", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours = rayline(arguments.model, arguments.threads, arguments.dtype)
    if arguments.peer_dtype == "faster":
        peer = faster_peer(arguments.model, arguments.batch)
    else:
        peer = static_generate(arguments.model, arguments.peer_dtype, arguments.batch)
    if not arguments.no_warmup:
        for contender in (ours, peer):
            contender.generate([Job(job.prompt, 4) for job in workload(0)])
    for repetition in range(1, arguments.repetitions + 1):
        jobs = workload(repetition)
        for contender in (ours, peer):
            contender.run(jobs)
    jobs = workload(1)
    prompts, tokens = sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)
    machine = f"{arguments.threads} threads, load average {os.getloadavg()[0]:.1f}"
    print(f"{arguments.model}: {len(jobs)} requests, {prompts} prompt and {tokens} output tokens, {machine}")
    report((ours, peer), tokens)


if __name__ == "__main__":
    main()
