"""Attention of a recorded step: one-token rows over the paged cache, all that they need in tensors.

`GatheredDecode` runs wherever torch does; on a CUDA device `triton_attention` reads the cache in place.
`pick` chooses, and believes a kernel only after it has given what torch gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar, Protocol, Self

import structlog
import torch
from torch import Tensor

from server.model.attention import Attention, AttentionVariant
from server.model.kv_cache import KVCache, KVSpec
from server.model.sdpa import attend

log = structlog.get_logger(__name__)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest ||kernel - torch, float64|| / ||torch, float64|| at which a kernel is believed."""
_KV_LENS = (1, 2, 40, 300)
"""Histories that it is tried with."""


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Where the rows of a step read and write. A row of nobody has a history of one token in the
    scratch block."""

    places: Tensor
    """int64 `[num_rows]`: where each row writes, `block * block_size + offset`."""
    begun_blocks: Tensor
    """int64 `[num_rows]`: the block that a row is the first to write to, else the scratch block. What
    it held before may not be finite."""
    block_tables: Tensor
    """int32 `[num_rows, num_blocks]`, padded with the scratch block."""
    kv_lens: Tensor
    """int32 `[num_rows]`: tokens of each row's history, its own among them."""


class DecodeAttention(Attention, Protocol):
    """One recorded step's attention."""

    name: ClassVar[str]

    @classmethod
    def over(cls, cache: KVCache, rows: DecodeRows) -> Self:
        """Attention over these tensors, whatever they hold when it runs."""


@dataclass(frozen=True, slots=True)
class GatheredDecode:
    """By torch's SDPA over gathered blocks."""

    name: ClassVar[str] = "sdpa"

    cache: KVCache
    rows: DecodeRows
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """bool `[num_rows, 1, 1, kv_len]` by window, shared by the layers of one pass."""

    @classmethod
    def over(cls, cache: KVCache, rows: DecodeRows) -> Self:
        """See `DecodeAttention.over`."""
        return cls(cache, rows)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `attention.Attention.attend`."""
        # A key or value that is not finite spoils the row that reads it even where it is masked.
        self.cache.clear(layer_idx, self.rows.begun_blocks)
        self.cache.write(layer_idx, self.rows.places, key, value)
        keys = self._gather(self.cache.keys[layer_idx])
        values = self._gather(self.cache.values[layer_idx])
        mask = self._mask(keys.shape[2], variant.sliding_window)
        return attend(query.unsqueeze(2), keys, values, mask, variant).squeeze(2)

    def _gather(self, pool: Tensor) -> Tensor:
        """`[num_rows, num_kv_heads, kv_len, head_dim]`, in memory of the step's own: the workspace that
        other steps share is let go when it grows, and a recorded step would write to it still."""
        num_rows, num_blocks = self.rows.block_tables.shape
        blocks = pool.index_select(0, self.rows.block_tables.flatten())
        kv_len = num_blocks * pool.shape[1]
        return blocks.view(num_rows, kv_len, *pool.shape[2:]).transpose(1, 2)

    def _mask(self, kv_len: int, window: int | None) -> Tensor:
        mask = self.masks.get(window)
        if mask is None:
            kv_positions = torch.arange(kv_len, device=self.rows.kv_lens.device)
            ends = self.rows.kv_lens.unsqueeze(1)
            mask = kv_positions < ends
            if window is not None:
                mask &= kv_positions >= ends - window
            mask = self.masks[window] = mask[:, None, None]
        return mask


def pick(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    layers: Sequence[tuple[KVSpec, AttentionVariant]],
    block_size: int,
) -> type[DecodeAttention]:
    """The fastest that serves a model. layers: of each, its cache and how its attention differs."""
    if device.type != "cuda" or find_spec("triton") is None:
        return GatheredDecode
    from server.model.triton_attention import TritonDecode

    error = 0.0
    try:
        for spec, variant in _distinct(layers):
            own = kernel_error(TritonDecode, device, dtype, num_heads, spec, variant, block_size)
            error = max(error, own)
            if not own <= _TOLERANCE[dtype]:
                raise RuntimeError(f"it differs from torch's by {own:.1e} of its norm")
    except Exception as reason:  # noqa: BLE001 -- whatever a compiler raises: torch's serves
        log.warning("decode attention gathers", instead_of=TritonDecode.name, reason=repr(reason))
        return GatheredDecode
    log.info("decode attention", kernel=TritonDecode.name, error=error)
    return TritonDecode


def kernel_error(
    kernel: type[DecodeAttention],
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    spec: KVSpec,
    variant: AttentionVariant,
    block_size: int,
) -> float:
    """||kernel - torch in float64|| / ||torch in float64|| over random histories of some lengths."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    num_rows = len(_KV_LENS)
    widths = [-(-kv_len // block_size) for kv_len in _KV_LENS]
    own = KVCache([spec], sum(widths), block_size, dtype, device, has_scratch=True)
    exact = KVCache([spec], sum(widths), block_size, torch.float64, device, has_scratch=True)
    for ours, theirs in ((own.keys, exact.keys), (own.values, exact.values)):
        ours[0].copy_(draw(*ours[0].shape))
        theirs[0].copy_(ours[0])
    blocks = iter(reversed(range(own.num_blocks)))
    tables = [[next(blocks) for _ in range(width)] for width in widths]
    places = [
        table[-1] * block_size + (kv_len - 1) % block_size
        for table, kv_len in zip(tables, _KV_LENS, strict=True)
    ]
    padding = [own.num_blocks] * max(widths)
    rows = DecodeRows(
        places=torch.tensor(places, device=device),
        begun_blocks=torch.full((num_rows,), own.num_blocks, device=device),
        block_tables=torch.tensor(
            [(table + padding)[: max(widths)] for table in tables], dtype=torch.int32, device=device
        ),
        kv_lens=torch.tensor(_KV_LENS, dtype=torch.int32, device=device),
    )
    query = draw(num_rows, num_heads, spec.key_dim)
    key = draw(num_rows, spec.num_kv_heads, spec.key_dim)
    value = draw(num_rows, spec.num_kv_heads, spec.value_dim)
    actual = kernel.over(own, rows).attend(0, query, key, value, variant)
    expected = GatheredDecode.over(exact, rows).attend(
        0, query.double(), key.double(), value.double(), variant
    )
    return float((actual.double() - expected).norm() / expected.norm())


def _distinct(
    layers: Sequence[tuple[KVSpec, AttentionVariant]],
) -> list[tuple[KVSpec, AttentionVariant]]:
    """One of each kind: what sinks hold makes no difference to a kernel, only whether there are any."""
    kinds = {
        (spec, v.scaling, v.sliding_window, v.softcap, v.sinks is None): (spec, v)
        for spec, v in layers
    }
    return list(kinds.values())
