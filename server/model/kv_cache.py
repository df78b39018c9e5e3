"""The paged KV cache's tensors. Which block belongs to whom is `engine/block_manager.py`'s business."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from server.model import huge_pages
from server.model.batch import BatchedSequence


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape of one layer's keys and values."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Cache memory of one token in this layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


def plan_num_blocks(
    specs: list[KVSpec],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int,
    cache_bytes: int | None,
    max_tokens: int,
) -> int:
    """How many blocks to allocate: `cache_bytes` worth of them, or by default a share of what is free.

    The default is at most what `max_tokens` can fill, and at most 30 % of the free memory of a CPU
    (others live there too) or 80 % of a GPU's (the rest is for activations).
    """
    bytes_per_block = block_size * sum(spec.bytes_per_token(dtype) for spec in specs)
    if cache_bytes is not None:
        return cache_bytes // bytes_per_block
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * 0.8)
    else:
        budget = int(psutil.virtual_memory().available * 0.3)
    return min(budget // bytes_per_block, -(-max_tokens // block_size))


class KVCache:
    """Keys and values of every layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`."""

    def __init__(
        self,
        specs: list[KVSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_scratch: bool = False,
    ) -> None:
        """has_scratch: one block more, `num_blocks` by number, for rows that belong to nobody."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks if has_scratch else None

        def pool(num_kv_heads: int, dim: int) -> Tensor:
            shape = (num_blocks + has_scratch, block_size, num_kv_heads, dim)
            made = torch.zeros(shape, dtype=dtype, device=device)
            huge_pages.advise(made)
            return made

        self.keys = [pool(spec.num_kv_heads, spec.key_dim) for spec in specs]
        self.values = [pool(spec.num_kv_heads, spec.value_dim) for spec in specs]
        self._workspaces: dict[str, Tensor] = {}
        if device.type == "cpu":
            # If they grew with the sequences, they would leave a hole in memory of each size they had.
            # Memory that is not touched takes none, as long as it is fresh: here, at load.
            for name, pools in (("key", self.keys), ("value", self.values)):
                num_reserved = max((made.numel() for made in pools), default=0)
                self._workspaces[name] = torch.empty(num_reserved, dtype=dtype)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def slot_mapping(self, batch: list[BatchedSequence]) -> list[int]:
        """Where each row of a step is written, in the batch's order: `block * block_size + offset`."""
        size = self.block_size
        return [
            sequence.block_table[position // size] * size + position % size
            for sequence in batch
            for position in range(sequence.start, sequence.num_kv_tokens)
        ]

    def write(self, layer_idx: int, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
        """Store the step's keys and values.

        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset`.
        key, value: `[num_tokens, num_kv_heads, head_dim]`.
        """
        self.keys[layer_idx].flatten(0, 1).index_copy_(0, slot_mapping, key)
        self.values[layer_idx].flatten(0, 1).index_copy_(0, slot_mapping, value)

    def clear(self, layer_idx: int, blocks: Tensor) -> None:
        """Set whole blocks to zero. blocks: int64 `[num_blocks]`."""
        self.keys[layer_idx].index_fill_(0, blocks, 0)
        self.values[layer_idx].index_fill_(0, blocks, 0)

    def is_finite(self, blocks: Sequence[int]) -> bool:
        """Whether the last layer's keys and values in these blocks are finite; waits for the device.

        What is not finite in a layer below makes all that follows it in the same row so.
        """
        index = torch.tensor(blocks, dtype=torch.int64, device=self.keys[-1].device)
        pools = (self.keys[-1], self.values[-1])
        return all(bool(pool.index_select(0, index).isfinite().all()) for pool in pools)

    def gather(self, layer_idx: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the given blocks, in their order.

        blocks: int64 `[..., num_blocks]`. Returns two tensors
        `[..., num_blocks * block_size, num_kv_heads, head_dim]` that the next call overwrites: every
        layer of every step gathers into the same memory, since megabytes fresh from the operating
        system each time cost more in page faults than the copy itself.
        """
        flat = blocks.flatten()
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        key = self._select("key", self.keys[layer_idx], flat)
        value = self._select("value", self.values[layer_idx], flat)
        return key.view(*shape, *key.shape[2:]), value.view(*shape, *value.shape[2:])

    def _select(self, name: str, pool: Tensor, blocks: Tensor) -> Tensor:
        size = blocks.numel() * pool[0].numel()
        workspace = self._workspaces.get(name)
        if workspace is None or workspace.numel() < size:
            workspace = self._workspaces[name] = pool.new_empty(size)
        selected = workspace[:size].view(blocks.numel(), *pool.shape[1:])
        return torch.index_select(pool, 0, blocks, out=selected)
