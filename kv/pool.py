"""The tensors of the paged KV pool (Kwon et al. 2023, PagedAttention): blocks anywhere, addressed by block tables.

A slot is one token's place: block id x block size + offset in the block. Block 0 is the null block: it pads block tables,
belongs to no sequence and holds finite numbers.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kv.formats import dequantize, is_quantized, quantize, vector_bytes

_STAGED_BYTES = 64 << 20
"""At most so much memory of the device, or one block's, is taken on the way to the host or back."""


class KVPool:
    """Keys and values of all layers of one worker.

    Tokens are the outer dimension inside a block, so that a block is one contiguous row to gather: on a 2-core Zen 3 (AVX2)
    gathering 64 sequences of about 200 tokens takes 10 to 20 % less than with heads outside.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype: what is kept; with torch.int8 and torch.float8_e4m3fn the rows of kv/formats.py."""
        self.dtype, self.device = dtype, device
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.quantized = is_quantized(dtype)
        """Whether what is read is not quite what was written."""
        row = (num_kv_heads * vector_bytes(dtype, head_dim),) if self.quantized else (num_kv_heads, head_dim)
        kept = torch.uint8 if self.quantized else dtype
        # Zeros, not empty: unused slots are gathered with the used ones and masked, and a weight of 0 times NaN would be NaN.
        self.keys = torch.zeros((num_layers, num_blocks, block_size, *row), dtype=kept, device=device)
        """[num_layers, num_blocks, block_size, num_kv_heads, head_dim]; quantized: [num_layers, num_blocks, block_size, row bytes]
        uint8, the parameters among them, so that whatever moves blocks moves these too."""
        self.values = torch.zeros_like(self.keys)
        """The same of values."""
        self._key_slots, self._value_slots = self.keys.flatten(1, 2), self.values.flatten(1, 2)

    @property
    def num_layers(self) -> int:
        """Of this worker."""
        return self.keys.shape[0]

    @property
    def num_blocks(self) -> int:
        """The null block included."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[2]

    @property
    def layout(self) -> str:
        """What a layer's blocks are like: those of two pools of the same can be exchanged."""
        return f"blocks of {self.block_size} tokens, {self.num_kv_heads} heads of {self.head_dim}, {self.dtype}"

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store one layer's new keys and values, [num_tokens, num_kv_heads, head_dim] each, at slots [num_tokens] int64."""
        for where, new in ((self._key_slots, keys), (self._value_slots, values)):
            where[layer].index_copy_(0, slots, quantize(new, self.dtype) if self.quantized else new.to(self.dtype))

    def room_to_read(self, num_blocks: int) -> Tensor:
        """For read() of so many blocks or fewer."""
        return self.keys.new_empty(2, num_blocks, self.keys[0, 0].numel())

    def read(self, layer: int, blocks: Tensor, dtype: torch.dtype, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One layer's keys and values of blocks [n] int64, [n * block_size, num_kv_heads, head_dim] each, in dtype.

        room: what room_to_read() gave, to be read through; then they are valid until it is used again.
        """
        found = []
        for i, source in enumerate((self.keys, self.values)):
            to = None if room is None else room[i, : len(blocks)]
            rows = torch.index_select(source[layer].flatten(1), 0, blocks, out=to).view(-1, *self.keys.shape[3:])
            found.append((dequantize(rows, self.num_kv_heads, self.head_dim, self.dtype) if self.quantized else rows).to(dtype))
        return found[0], found[1]

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where a layer's keys and values begin."""
        return self.keys[layer].data_ptr(), self.values[layer].data_ptr()

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, through all layers, in the order given: a later copy sees the earlier
        ones."""
        for source, destination in copies:
            self.keys[:, destination] = self.keys[:, source]
            self.values[:, destination] = self.values[:, source]

    # --- blocks on their way to or from elsewhere, [2 (keys, values), num_layers, blocks, block_size, *what a token has] ---------

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers, with their parameters."""
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def room(self, num_blocks: int) -> Tensor:
        """For so many blocks; what is in it means nothing."""
        layers, _, *shape = self.keys.shape
        return self.keys.new_empty(2, layers, num_blocks, *shape)

    def gather(self, blocks: Sequence[int]) -> Tensor:
        """A copy of these blocks."""
        ids, content = self._ids(blocks), self.room(len(blocks))
        torch.index_select(self.keys, 1, ids, out=content[0])
        torch.index_select(self.values, 1, ids, out=content[1])
        return content

    def scatter(self, blocks: Sequence[int], content: Tensor) -> None:
        """Put what gather() gave, here or in another pool of this layout, into these blocks."""
        ids = self._ids(blocks)
        self.keys.index_copy_(1, ids, content[0])
        self.values.index_copy_(1, ids, content[1])

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks).to(self.device, non_blocking=True)


class HostBlocks:
    """Slots of host memory for whole blocks of a worker's pool: pinned where that is on a GPU, so that nothing waits for copies.

    A slot is one contiguous row, gathered on the device, so that it takes one transfer however many layers and heads it has. What
    is pinned, torch rounds up to a power of two bytes.
    """

    def __init__(self, pool: KVPool, num_slots: int) -> None:
        layers, _, *block = pool.keys.shape
        self._pool = pool
        pinned = pool.device.type == "cuda"
        self.slots = torch.empty((num_slots, 2, layers, *block), dtype=pool.keys.dtype, pin_memory=pinned)
        """[num_slots, 2 (keys, values), num_layers, block_size, *what a token has]; nothing but what was stored is read."""

    def store(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy blocks of the pool into slots, which are all different."""
        for some, places in self._portions(blocks, slots):
            rows = self._pool.gather(some).movedim(2, 0).contiguous()
            for row, slot, count in _runs(places):
                self.slots[slot : slot + count].copy_(rows[row : row + count], non_blocking=True)

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy slots into blocks of the pool, which are all different."""
        for some, places in self._portions(blocks, slots):
            rows = self.slots.new_empty((len(places), *self.slots.shape[1:]), device=self._pool.device)
            for row, slot, count in _runs(places):
                rows[row : row + count].copy_(self.slots[slot : slot + count], non_blocking=True)
            self._pool.scatter(some, rows.movedim(0, 2))

    def _portions(self, blocks: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Blocks and their slots, in the order of these."""
        pairs = sorted(zip(slots, blocks, strict=True))
        most = max(1, _STAGED_BYTES // self._pool.bytes_per_block)
        for at in range(0, len(pairs), most):
            portion = pairs[at : at + most]
            yield [block for _, block in portion], [slot for slot, _ in portion]


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of ascending slots: where a run of consecutive ones begins, with which slot, and how many it has."""
    begin = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1:
            yield begin, slots[begin], at - begin
            begin = at
