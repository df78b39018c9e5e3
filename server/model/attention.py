"""Paged attention behind transformers' `AttentionInterface`.

Every attention module of the model calls `paged_attention` with the packed step; the current step's
backend (`StepLayout`) writes keys and values into the paged cache and attends each sequence to its own
history.

Axis names: num_tokens (packed, all sequences), num_heads, num_kv_heads, head_dim, kv_len.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.errors import ModelError
from server.model import context
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache

ATTENTION_NAME = "fathom_paged"

# What transformers passes to every attention function and needs no answer here: there is no dropout at
# inference, causality is what this file computes, positions are in the rotary embedding already, and
# the rest is bookkeeping of transformers' own caches and outputs.
_IGNORED_ARGUMENTS = frozenset(
    {
        "dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position",
        "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
        "return_dict",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """How one layer's attention differs from plain softmax attention."""

    scaling: float
    sliding_window: int | None = None
    """Each token sees itself and `sliding_window - 1` tokens before it."""
    softcap: float | None = None
    """Scores pass `softcap * tanh(scores / softcap)` (Gemma 2)."""
    sinks: Tensor | None = None
    """`[num_heads]`: one extra logit a head that takes probability and gives no value (gpt-oss)."""


class Attention(Protocol):
    """One forward pass's attention: answers every layer in turn."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """query `[num_tokens, num_heads, head_dim]`, key and value `[num_tokens, num_kv_heads, head_dim]`.

        Returns `[num_tokens, num_heads, value_dim]`.
        """


class StepLayout(Attention, Protocol):
    """An attention backend: lays out a step over the paged cache, then answers its layers."""

    name: ClassVar[str]

    @classmethod
    def build(cls, cache: KVCache, batch: list[BatchedSequence], device: torch.device) -> Self:
        """batch: one-token sequences first."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query `[num_rows, num_heads, row_len, head_dim]` and so on.

    A step is one row of packed tokens. Returns `[num_rows, row_len, num_heads, value_dim]`. Raises
    ModelError for an argument that would change the result and is not known here: silence would be a
    wrong answer.
    """
    unknown = [
        name
        for name, given in kwargs.items()
        if given is not None and name not in _IGNORED_ARGUMENTS
    ]
    if unknown or attention_mask is not None:
        names = ", ".join(sorted(unknown)) or "attention_mask"
        raise ModelError(f"attention of {type(module).__name__} passes {names}, not supported here")
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise ModelError(
            f"{type(module).__name__} has no layer_idx, so it has no place in the cache"
        )
    variant = AttentionVariant(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    step = context.current()
    output = step.attention.attend(
        layer_idx,
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        variant,
    )
    if step.wanted is not None:
        step.wanted.attended()
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


def register() -> None:
    """Make `attn_implementation="fathom_paged"` known to transformers; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
