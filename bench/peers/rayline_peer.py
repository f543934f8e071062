"""Our own engine, offline, beside the peers: asked as they are (see bench.peers), by the interpreter that runs the benchmark.

python rayline_peer.py ANSWERS_FD MODEL [DTYPE [SLOTS [MAX_MODEL_LEN]]] [--prefix-cache on] [--threads N] [--kv-tokens N]

It is LLM.generate: text is made of the tokens, as a user has it.
"""

import argparse
import json
import os
import sys

import torch

from cluster.config import Config
from cluster.model import open_model
from cluster.offline import LLM
from cluster.protocol import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("dtype", nargs="?", default="auto")
    parser.add_argument("slots", nargs="?", type=int, default=64)
    parser.add_argument("max_model_len", nargs="?", type=int, default=2048)
    parser.add_argument("--prefix-cache", choices=["on", "off"], default="off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kv-tokens", type=int)
    asked = parser.parse_args()

    torch.set_num_threads(asked.threads)
    shape = open_model(asked.model).shape
    tokens = (asked.kv_tokens or asked.slots * asked.max_model_len) + (asked.slots + 1) * Config.block_size
    kv_memory = tokens * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * 4
    llm = LLM(
        asked.model,
        dtype=asked.dtype,
        threads=asked.threads,
        max_num_seqs=asked.slots,
        max_model_len=asked.max_model_len,
        prefix_cache=asked.prefix_cache,
        kv_memory=kv_memory,
    )
    computes = str(llm.runner.decoder.dtype).removeprefix("torch.")
    with open(asked.answers, "w", encoding="utf-8") as answers:
        print("ready", json.dumps({"name": "rayline", "computes": computes}), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            params = [SamplingParams(max_tokens=tokens, temperature=0.0) for tokens in asks["output_tokens"]]
            completions = llm.generate(asks["prompts"], params, ignore_eos=True)
            outputs = [completion.outputs[0].token_ids for completion in completions]
            print(json.dumps({"outputs": outputs}), file=answers, flush=True)


if __name__ == "__main__":
    main()
