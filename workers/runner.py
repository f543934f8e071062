"""The model runner: one StepPlan in, one StepResult out, on one device. Of a divided model it runs one rank's part."""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import Config, ConfigError, SpeculativeAcceptance
from cluster.model import ModelFiles
from cluster.protocol import ChunkResult, StageTime, StepPlan, StepResult
from cluster.schemes import parse_recipe
from kv.formats import vector_bytes
from kv.pool import HostBlocks, KVPool
from parallel.handoff import Handoff
from parallel.membership import ALONE, NO_PEERS, Membership, Peers
from parallel.partition import partition
from workers.decoder import Decoder
from workers.device import resolve_device, resolve_dtype, resolve_kv_dtype, resolve_max_model_len, size_pool
from workers.kernels import choose_kernels
from workers.loader import load_decoder
from workers.logprobs import score_prompts
from workers.paged import PagedModel
from workers.sampler import Draw, Sampler
from workers.sequences import SequenceTable, Span
from workers.speculative.draft import DraftModel
from workers.speculative.drafter import Drafter
from workers.speculative.load import load_draft
from workers.speculative.lookup import PromptLookup
from workers.speculative.rejection import Rejecting, RejectionSampling
from workers.speculative.verifier import Coupled, Verifier

_KEPT_TIMES = 4096


class ModelRunner:
    """A rank's decoder, its KV pool and the sequences of one epoch."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        max_model_len: int,
        *,
        peers: Peers = NO_PEERS,
        handoff: Handoff | None = None,
        leader: bool = True,
        host: HostBlocks | None = None,
        drafter: Drafter | None = None,
        acceptance: SpeculativeAcceptance = "coupled",
    ) -> None:
        """handoff: to and from the neighbouring stages, where there are some. leader: draw tokens, in the last stage. host: memory
        for blocks that the pool has no room for, where there is some. drafter: proposes tokens, where they are drawn. acceptance:
        which of those stand."""
        self.peers = peers
        self.max_model_len = max_model_len
        """The longest sequence that positions are prepared for."""
        self.times: deque[StageTime] = deque(maxlen=_KEPT_TIMES)
        """When each of the last plans was computed here; whoever reads it empties it. On CUDA only the last stage waits for its
        device: of the others it is when they launched."""
        self.model = PagedModel(decoder, pool, host)
        self._device = self.model.device
        draws = leader and decoder.part.judges
        vocab_size = decoder.shape.vocab_size
        sampler = Sampler(decoder.kernels.picker(vocab_size, self._device)) if draws else None
        self._verifier: Verifier | None = None if sampler is None else Coupled(sampler)
        if sampler is not None and drafter is not None and acceptance == "rejection":
            self._verifier = Rejecting(sampler, drafter, RejectionSampling(vocab_size, self._device))
        self._sequences = SequenceTable(pool.block_size)
        self._handoff = handoff
        self._drafter = drafter

    @property
    def decoder(self) -> Decoder:
        """This rank's part of the model."""
        return self.model.decoder

    @property
    def pool(self) -> KVPool:
        """Its keys and values."""
        return self.model.pool

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, the null block included."""
        return self.pool.num_blocks

    @property
    def layout(self) -> str:
        """What its pool is like: KV can be taken over from a rank of the same."""
        part = self.decoder.part
        return f"layers {part.layers.start}-{part.layers.stop}, heads {part.kv_heads}, {self.pool.layout}"

    @property
    def host_blocks(self) -> int:
        """Blocks that host memory holds besides."""
        return 0 if self.model.host is None else len(self.model.host.slots)

    @property
    def answers(self) -> bool:
        """Whether this rank's results are the engine's: the leader of the last stage."""
        return self._verifier is not None

    def expect(self, plan: StepPlan) -> None:
        """A plan that execute() will be called with later; call in the order of the plans."""
        if self._handoff is not None:
            self._handoff.expect(_num_tokens(plan))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration; the result is empty unless this rank `answers`.

        Plans must come in order. Raises PlanError for a plan that doesn't follow from those before it; after any exception the
        runner's state is undefined.
        """
        incoming = self._receive(plan)
        began, clock = time.time(), time.perf_counter()
        spans = self._sequences.apply(plan)
        self.model.move(plan)
        if self._drafter is not None:
            self._drafter.move(plan)
        result = StepResult(epoch=plan.epoch, step=plan.step, results=[])
        if spans:
            with self.decoder.kernels.awake():
                hidden = self.forward(spans, incoming)
                if self.decoder.part.judges:
                    self._answer(hidden, spans, result)
                if self._drafter is not None:
                    self._propose(self._drafter, spans, result)
            if self._handoff is not None and not self.decoder.part.judges:
                self._handoff.send(hidden)
        if self._device.type == "cuda" and self.decoder.part.judges:  # nobody else waits: so many plans, and no more, are queued
            torch.cuda.current_stream(self._device).synchronize()
        result.compute_s = time.perf_counter() - clock
        self.times.append(StageTime(plan.step, began, began + result.compute_s, _num_tokens(plan)))
        return result

    def forget(self, blocks: Sequence[int]) -> None:
        """Keys and values come into these blocks from elsewhere."""
        if self._drafter is not None:
            self._drafter.forget(blocks)

    def reset(self) -> None:
        """Forget all sequences: a new epoch begins."""
        self._sequences = SequenceTable(self.pool.block_size)

    def forward(self, spans: Sequence[Span], incoming: Tensor | None = None) -> Tensor:
        """See PagedModel.forward."""
        return self.model.forward(spans, incoming)

    def _receive(self, plan: StepPlan) -> Tensor | None:
        if self._handoff is None or self.decoder.part.embeds or not plan.chunks:
            return None
        return self._handoff.receive(_num_tokens(plan))

    def _answer(self, hidden: Tensor, spans: Sequence[Span], result: StepResult) -> None:
        """Logits are made by all ranks of the last stage together; what becomes of them is the leader's."""
        size = self.decoder.shape.vocab_size
        result.scores = score_prompts(hidden, spans, self.decoder.logits, size, tell=self._verifier is not None)
        result.results = self._draw(hidden, spans)

    def _draw(self, hidden: Tensor, spans: Sequence[Span]) -> list[ChunkResult]:
        ends = np.cumsum([span.num_tokens for span in spans])
        drawing = [span for span in spans if span.sample]
        if not drawing:
            return []
        rows = [row for end, span in zip(ends, spans, strict=True) if span.sample for row in range(end - 1 - span.verify, end)]
        if len(rows) < len(hidden):  # not only decodes
            hidden = hidden.index_select(0, self.model.to_device(np.array(rows)))
        logits = self.decoder.logits(hidden)
        if self._verifier is None:
            return []
        return [self._result(span, draws) for span, draws in zip(drawing, self._verifier.draw(logits, drawing), strict=True)]

    @staticmethod
    def _propose(drafter: Drafter, spans: Sequence[Span], result: StepResult) -> None:
        began = time.perf_counter()
        proposals = {span.state.seq: proposed for span, proposed in zip(spans, drafter.propose(spans), strict=True) if proposed}
        for drawn in result.results if proposals else ():
            drawn.proposed = proposals.get(drawn.seq, [])
        result.draft_s, result.draft_passes = time.perf_counter() - began, drafter.passes

    def _result(self, span: Span, draws: list[Draw]) -> ChunkResult:
        tokens = [draw.token for draw in draws]
        if not span.state.draws.candidates:  # of beams the engine says which token comes next
            self._sequences.commit(span, tokens)
        return ChunkResult(span.state.seq, tokens, [draw.logprobs for draw in draws if draw.logprobs])


def load_runner(
    files: ModelFiles,
    config: Config,
    *,
    num_blocks: int | None = None,
    progress: bool = False,
    membership: Membership = ALONE,
) -> ModelRunner:
    """Load the model, or this rank's part of it, and lay out its KV pool; returns when the other ranks have joined.

    num_blocks: the pool's size where it is known already (the null block included); else `size_pool` decides, after the weights are
    loaded. progress: show a bar on stderr. Sets torch's thread count, which is the process's, where config.threads says so.
    Raises ConfigError for anything that cannot work: device, dtype, checkpoint, memory, a division of the model.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    shape, seat = files.shape, membership.seat
    part = partition(shape, seat, config.stage_layers)
    device = resolve_device(config.device)
    kernels = choose_kernels(config, device)
    dtype = resolve_dtype(config.dtype, shape.dtype, device, kernels.cpu_dtypes)
    max_model_len = resolve_max_model_len(config, shape)
    terms = {"dtype": str(dtype), "device": device.type, "model": str(shape), "block_size": str(config.block_size)}
    terms["KV"] = str(resolve_kv_dtype(config.kv_dtype, dtype))
    terms["hidden states"] = str(kernels.hidden_dtype(dtype))
    peers = membership.join(device, config.step_timeout_s, terms)
    recipe = parse_recipe(config.quantization)
    decoder = load_decoder(
        files, part, dtype, device, max_model_len, kernels=kernels, recipe=recipe, peers=peers.stage, progress=progress
    )
    answers = seat.leader and part.judges
    draft = load_draft(config, shape, max_model_len, device, kernels) if answers else None
    if num_blocks is None:
        beside = 0 if draft is None else _bytes_per_token(draft, config.kv_dtype)
        kv_dtype = resolve_kv_dtype(config.kv_dtype, dtype)
        num_blocks = size_pool(config, shape, part, max_model_len, dtype, kv_dtype, device, peers.neighbours, beside)
    elif num_blocks < 2:
        raise ConfigError(f"num_blocks is {num_blocks}, but a pool needs the null block and at least one more")
    pool = _pool(decoder, num_blocks, config, device)
    draft_pool = None if draft is None else _pool(draft, num_blocks, config, device)
    host, draft_host = _host_blocks(config, pool, draft_pool)
    drafter: Drafter | None = PromptLookup() if config.speculative == "lookup" and answers else None
    if draft is not None and draft_pool is not None:
        sampling = RejectionSampling(shape.vocab_size, device) if config.speculative_acceptance == "rejection" else None
        drafter = DraftModel(PagedModel(draft, draft_pool, draft_host), sampling)
    handoff = Handoff(peers.column, shape.hidden_size, decoder.stack.hidden_dtype, device) if seat.mesh.pp > 1 else None
    return ModelRunner(
        decoder,
        pool,
        max_model_len,
        peers=peers,
        handoff=handoff,
        leader=seat.leader,
        host=host,
        drafter=drafter,
        acceptance=config.speculative_acceptance,
    )


def _bytes_per_token(decoder: Decoder, kv_dtype: str) -> int:
    return decoder.part.kv_bytes_per_token(vector_bytes(resolve_kv_dtype(kv_dtype, decoder.dtype), decoder.shape.head_dim))


def _pool(decoder: Decoder, num_blocks: int, config: Config, device: torch.device) -> KVPool:
    part, shape, dtype = decoder.part, decoder.shape, resolve_kv_dtype(config.kv_dtype, decoder.dtype)
    try:
        return KVPool(len(part.layers), num_blocks, config.block_size, len(part.kv_heads), shape.head_dim, dtype, device)
    except RuntimeError as error:  # torch's OutOfMemoryError is one; on a CPU it is just that
        needed = num_blocks * config.block_size * _bytes_per_token(decoder, config.kv_dtype)
        raise ConfigError(f"the {device.type} has no {needed} bytes for the KV pool; set kv_memory to less") from error


def _host_blocks(config: Config, pool: KVPool, draft: KVPool | None) -> tuple[HostBlocks | None, HostBlocks | None]:
    """The host memory that the settings want, for the pool and for the draft model's, as many slots of each. Raises ConfigError."""
    if not config.host_kv_memory:
        return None, None
    needed = pool.bytes_per_block + (draft.bytes_per_block if draft is not None else 0)
    slots = config.host_kv_memory // needed
    if not slots:
        raise ConfigError(f"{config.host_kv_memory} bytes of host_kv_memory hold no block, which takes {needed}")
    try:
        return HostBlocks(pool, slots), HostBlocks(draft, slots) if draft is not None else None
    except RuntimeError as error:
        raise ConfigError(f"the host has no {config.host_kv_memory} bytes for KV; set host_kv_memory to less") from error


def _num_tokens(plan: StepPlan) -> int:
    return sum(chunk.num_tokens for chunk in plan.chunks)
