"""The model runner: one StepPlan in, one StepResult out, on one device."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles
from cluster.protocol import ChunkResult, StepPlan, StepResult
from kv.pool import KVPool
from workers.attention import PagedSpans, make_attention
from workers.decoder import Decoder, TokenBatch
from workers.device import resolve_device, resolve_dtype, resolve_max_model_len, size_pool
from workers.loader import load_decoder
from workers.logprobs import score_prompts
from workers.sampler import Sampler
from workers.sequences import SequenceTable, Span


class ModelRunner:
    """A decoder, its KV pool and the sequences of one epoch."""

    def __init__(self, decoder: Decoder, pool: KVPool, attention: str, max_model_len: int) -> None:
        self.decoder = decoder
        self.pool = pool
        self.max_model_len = max_model_len
        """The longest sequence that positions are prepared for."""
        self._device = pool.keys.device
        self._attention = make_attention(attention, pool, decoder.shape.windows)
        self._sampler = Sampler(decoder.shape.vocab_size, self._device)
        self._sequences = SequenceTable(pool.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, the null block included."""
        return self.pool.num_blocks

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration. Plans must come in order. Raises PlanError for a plan that doesn't follow from those before it;
        after any exception the runner's state is undefined."""
        began = time.perf_counter()
        spans = self._sequences.apply(plan)
        self.pool.copy_blocks(plan.copies)
        result = StepResult(epoch=plan.epoch, step=plan.step, results=[])
        if spans:
            hidden = self.forward(spans)
            result.scores = score_prompts(hidden, spans, self.decoder.logits, self.decoder.shape.vocab_size)
            result.results = self._draw(hidden, spans)
        result.compute_s = time.perf_counter() - began
        return result

    def reset(self) -> None:
        """Forget all sequences: a new epoch begins."""
        self._sequences = SequenceTable(self.pool.block_size)

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Run the spans as one flat batch; returns the hidden states [num_tokens, hidden] before the last norm."""
        paged = PagedSpans.of(spans, self.pool.block_size)
        positions = paged.positions()
        rows = np.stack((np.concatenate([span.ids for span in spans]), positions, paged.slots(positions)))
        ids, positions_there, slots = self._to_device(rows).unbind()
        batch = TokenBatch(ids, positions_there, slots, self._attention.prepare(paged))
        return self.decoder.forward(batch, self.pool)

    def _draw(self, hidden: Tensor, spans: Sequence[Span]) -> list[ChunkResult]:
        last_rows = np.cumsum([span.num_tokens for span in spans]) - 1
        sampled = [i for i, span in enumerate(spans) if span.sample]
        if not sampled:
            return []
        rows = self._to_device(last_rows[sampled])
        drawing = [spans[i] for i in sampled]
        draws = self._sampler.draw(self.decoder.logits(hidden.index_select(0, rows)), drawing)
        results = []
        for span, draw in zip(drawing, draws, strict=True):
            self._sequences.commit(span, [draw.token])
            results.append(ChunkResult(span.state.seq, [draw.token], [draw.logprobs] if draw.logprobs else []))
        return results

    def _to_device(self, array: "np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]") -> Tensor:
        # From pageable memory, non_blocking returns once the array was taken: nothing waits for the device, and the array may go.
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(self._device, non_blocking=True)


def load_runner(files: ModelFiles, config: Config, *, num_blocks: int | None = None, progress: bool = False) -> ModelRunner:
    """Load the model and lay out its KV pool.

    num_blocks: the pool's size where it is known already (the null block included); else `size_pool` decides, after the weights are
    loaded. progress: show a bar on stderr. Sets torch's thread count, which is the process's, where config.threads says so.
    Raises ConfigError for anything that cannot work: device, dtype, checkpoint, memory.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shape = files.shape
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, shape.dtype, device)
    max_model_len = resolve_max_model_len(config, shape)
    decoder = load_decoder(files, dtype, device, max_model_len, progress=progress)
    if num_blocks is None:
        num_blocks = size_pool(config, shape, max_model_len, dtype, device)
    elif num_blocks < 2:
        raise ConfigError(f"num_blocks is {num_blocks}, but a pool needs the null block and at least one more")
    try:
        pool = KVPool(shape.num_layers, num_blocks, config.block_size, shape.num_kv_heads, shape.head_dim, dtype, device)
    except RuntimeError as error:  # torch's OutOfMemoryError is one; on a CPU it is just that
        needed = num_blocks * config.block_size * shape.kv_bytes_per_token(dtype.itemsize)
        raise ConfigError(f"the {device.type} has no {needed} bytes for the KV pool; set kv_memory to less") from error
    return ModelRunner(decoder, pool, config.attention, max_model_len)
