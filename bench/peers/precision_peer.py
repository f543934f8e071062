"""A model directory as a side of a comparison of precisions (see bench.peers for what it is asked), by our engine or, with --plain,
by transformers' generate(), whose linears are torch's F.linear. It tells how long it took to load and what memory that left taken.

python precision_peer.py ANSWERS_FD MODEL [--plain] [--dtype float32] [--threads N]
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.contenders import load_peer, padded_generate
from cluster.offline import LLM
from cluster.protocol import SamplingParams

Outputs = list[list[int]]
_SLOTS, _LENGTH = 16, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    before, began = resident(), time.perf_counter()
    generate = plain(asked.model, asked.dtype) if asked.plain else ours(asked.model, asked.dtype, asked.threads)
    about = {"load_s": time.perf_counter() - began, "resident_bytes": resident() - before}
    with open(asked.answers, "w", encoding="utf-8") as answers:
        print("ready", json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            print(json.dumps({"outputs": generate(asks["prompts"], asks["output_tokens"])}), file=answers, flush=True)


def ours(model: str, dtype: str, threads: int) -> Callable[[Outputs, Sequence[int]], Outputs]:
    """LLM.generate, greedily."""
    memory = 512 << 20  # taken when it is written
    settings = {"max_num_seqs": _SLOTS, "max_model_len": _LENGTH, "prefix_cache": "off", "kv_memory": memory}
    llm = LLM(model, dtype=dtype, threads=threads, **settings)  # type: ignore[arg-type]

    def generate(prompts: Outputs, counts: Sequence[int]) -> Outputs:
        params = [SamplingParams(max_tokens=count, temperature=0.0) for count in counts]
        return [completion.outputs[0].token_ids for completion in llm.generate(prompts, params, ignore_eos=True)]

    return generate


def plain(model: str, dtype: str) -> Callable[[Outputs, Sequence[int]], Outputs]:
    """transformers' generate(); all prompts are of one length, and all outputs."""
    loaded = load_peer(model, dtype)
    return lambda prompts, counts: padded_generate(loaded, prompts, counts[0])


def resident() -> int:
    """Bytes of memory that are this process's own: mapped files are not."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
