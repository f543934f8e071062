"""llama.cpp as a peer (see bench.peers for what it is asked): its batched decode, by llama-cpp-python's low-level binding, under a
small scheduler of our own. MODEL is a GGUF file. Run by an interpreter that has llama-cpp-python:

python llamacpp_peer.py ANSWERS_FD MODEL [DTYPE [SLOTS [MAX_MODEL_LEN]]] [--prefix-cache on] [--threads N] [--kv-tokens N]

The file's dtype is what it multiplies. Iterations decode one token of every running sequence and prefill others in the room that is
left. With the prefix cache, what all prompts of one call begin with is computed once and copied to each sequence.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STEP_TOKENS = 512


@dataclass
class Running:
    """A request that has a sequence of the context."""

    number: int
    prompt: list[int]
    output_tokens: int
    sequence: int
    computed: int
    """Tokens whose KV is in the context."""
    output: list[int] = field(default_factory=list)


class Batch:
    """llama_batch of one sequence id for each token."""

    def __init__(self, llama_cpp: Any, tokens: int) -> None:
        self.raw = llama_cpp.llama_batch_init(tokens, 0, 1)
        self.rows: list[tuple[Running, int]] = []
        """Whose next token is drawn from which row's logits."""

    def clear(self) -> None:
        self.raw.n_tokens = 0
        self.rows.clear()

    def add(self, tokens: Sequence[int], position: int, sequence: int) -> None:
        raw, start = self.raw, self.raw.n_tokens
        for row, token in enumerate(tokens, start):
            raw.token[row], raw.pos[row], raw.logits[row] = token, position + row - start, 0
            raw.n_seq_id[row], raw.seq_id[row][0] = 1, sequence
        raw.n_tokens = start + len(tokens)

    def draw(self, running: Running) -> None:
        """From what was added last."""
        self.raw.logits[self.raw.n_tokens - 1] = 1
        self.rows.append((running, self.raw.n_tokens - 1))


class Engine:
    """A context of `slots` sequences, and one more for what prompts share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        import llama_cpp  # type: ignore[import-not-found, unused-ignore]

        self._cpp: Any = llama_cpp
        self._slots, self._shares = asked.slots, asked.prefix_cache == "on"
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(asked.model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp can't load {asked.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = asked.slots + self._shares
        params.n_ctx = params.n_seq_max * -(-asked.max_model_len // 256) * 256
        params.n_batch = params.n_ubatch = STEP_TOKENS
        params.n_threads = params.n_threads_batch = asked.threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp has no memory for a context of {params.n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = Batch(llama_cpp, STEP_TOKENS)

    def describe(self) -> str:
        """The file's dtype, and the KV's."""
        text = self._cpp.ctypes.create_string_buffer(200)
        self._cpp.llama_model_desc(self._model, text, len(text))
        return f"{text.value.decode().split()[-1]}, KV F16"

    def generate(self, prompts: Sequence[list[int]], output_tokens: Sequence[int]) -> list[list[int]]:
        self._cpp.llama_memory_clear(self._memory, False)
        shared = self._prefill_shared(prompts) if self._shares and len(prompts) > 1 else 0
        # Rows of sequences are computed together where their ids follow each other: the longest outputs get the lowest ids.
        waiting = sorted(range(len(prompts)), key=lambda i: output_tokens[i])
        free = list(range(self._slots))[::-1]
        running: list[Running] = []
        outputs: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            while waiting and free:
                number = waiting.pop()
                running.append(Running(number, prompts[number], output_tokens[number], free.pop(), shared))
                if shared:
                    self._cpp.llama_memory_seq_cp(self._memory, self._slots, running[-1].sequence, -1, -1)
            running.sort(key=lambda one: one.sequence)
            self._fill(running)
            self._decode()
            for one, row in self._batch.rows:
                logits = np.ctypeslib.as_array(self._cpp.llama_get_logits_ith(self._context, row), (self._vocab_size,))
                one.output.append(int(logits.argmax()))
                if len(one.output) == one.output_tokens:
                    outputs[one.number] = one.output
                    self._cpp.llama_memory_seq_rm(self._memory, one.sequence, -1, -1)
                    free.append(one.sequence)
            running = [one for one in running if len(one.output) < one.output_tokens]
        return outputs

    def _prefill_shared(self, prompts: Sequence[list[int]]) -> int:
        """Tokens that all prompts begin with, at most all but the last of one, computed."""
        longest = min(map(len, prompts)) - 1
        shared = next((at for at in range(longest) if len({prompt[at] for prompt in prompts}) > 1), longest)
        for start in range(0, shared, STEP_TOKENS):
            self._batch.clear()
            self._batch.add(prompts[0][start : min(shared, start + STEP_TOKENS)], start, self._slots)
            self._decode()
        return shared

    def _fill(self, running: Sequence[Running]) -> None:
        batch = self._batch
        batch.clear()
        for one in running:
            if one.output:
                batch.add(one.output[-1:], one.computed, one.sequence)
                batch.draw(one)
                one.computed += 1
        for one in running:
            if not one.output and (room := STEP_TOKENS - batch.raw.n_tokens) > 0:
                chunk = one.prompt[one.computed : one.computed + room]
                batch.add(chunk, one.computed, one.sequence)
                one.computed += len(chunk)
                if one.computed == len(one.prompt):
                    batch.draw(one)

    def _decode(self) -> None:
        if status := self._cpp.llama_decode(self._context, self._batch.raw):
            sys.exit(f"llama_decode gave {status}")


def main() -> None:
    import llama_cpp

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("dtype", nargs="?", default="auto", help="not used: the file has one")
    parser.add_argument("slots", nargs="?", type=int, default=64)
    parser.add_argument("max_model_len", nargs="?", type=int, default=2048)
    parser.add_argument("--prefix-cache", choices=["on", "off"], default="off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kv-tokens", type=int, help="not used: each sequence has its own part of the context")
    asked = parser.parse_args()
    if asked.slots > STEP_TOKENS:
        parser.error(f"at most {STEP_TOKENS} slots")

    engine = Engine(asked)
    with open(asked.answers, "w", encoding="utf-8") as answers:
        about = {"name": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", "computes": engine.describe()}
        print("ready", json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            outputs = engine.generate(asks["prompts"], asks["output_tokens"])
            print(json.dumps({"outputs": outputs}), file=answers, flush=True)


if __name__ == "__main__":
    main()
