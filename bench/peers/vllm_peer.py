"""vLLM, offline, as a peer (see bench.peers for what it is asked). Run by the interpreter of an environment that has vLLM:

python vllm_peer.py ANSWERS_FD MODEL DTYPE SLOTS MAX_MODEL_LEN
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; it takes a share of the machine otherwise


def main() -> None:
    from vllm import LLM, SamplingParams

    fd, model, dtype, slots, max_model_len = sys.argv[1:]
    llm = LLM(
        model=model,
        dtype=dtype,
        max_num_seqs=int(slots),
        max_model_len=int(max_model_len),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    with open(int(fd), "w", encoding="utf-8") as answers:
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in asked["output_tokens"]]
            prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
            done = llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps({"outputs": [list(each.outputs[0].token_ids) for each in done]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
