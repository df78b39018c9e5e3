"""Sequences of one step -> packed tensors -> logits.

The only caller of the transformers model once it is loaded. Knows rows, not requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model import context
from server.model.adapters import AdapterSlots
from server.model.attention import AttentionStep, StepLayout
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache
from server.model.lora import LoraHooks, LoraStep
from server.model.targets import Targets

Logits = Tensor
"""`[num_logits, vocab_size]` on the model's device; what the engine hands on to its sampler."""


class ModelRunner:
    """Runs packed steps `[1, num_tokens]` over an unmodified transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        targets: Targets,
        max_loras: int,
        layout: type[StepLayout] = AttentionStep,
        max_lora_bytes: int | None = None,
    ) -> None:
        self.model = model
        self._layout = layout
        self.cache = cache
        self.targets = targets
        self.hooks = LoraHooks(targets.num_layers, num_stacked=max_loras)
        self.slots = AdapterSlots(
            self.hooks, targets, max_loras, model.dtype, model.device, max_lora_bytes
        )

    @torch.inference_mode()
    def run(self, batch: Sequence[BatchedSequence]) -> tuple[Logits, list[int]]:
        """One forward pass.

        Returns logits in the model's dtype and the order in which the batch was packed: logits
        begin with the `num_logits` rows of `batch[order[0]]`, and so on. Raises ModelError for a row
        whose slot does not hold its adapter as deep as the row reaches.
        """
        order = sorted(range(len(batch)), key=lambda index: _packing_key(batch[index]))
        packed = [batch[index] for index in order]
        device = self.model.device
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for sequence in packed:
            self.slots.check(sequence.slot, sequence.depth)
            token_ids.extend(sequence.token_ids)
            positions.extend(range(sequence.start, sequence.num_kv_tokens))
            logit_rows.extend(range(len(token_ids) - sequence.num_logits, len(token_ids)))
        lora = LoraStep.build(packed, self.targets.num_layers)
        self.hooks.install(0 if lora is None else lora.max_depth)
        attention = self._layout.build(self.cache, packed, device)
        with context.step(context.StepContext(attention, lora)):
            output = self.model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(logit_rows, dtype=torch.int64, device=device),
            )
        logits: Logits = output.logits[0]
        return logits, order

    def close(self) -> None:
        """Take every hook off the model."""
        self.slots.clear()
        self.hooks.install(0)


def _packing_key(sequence: BatchedSequence) -> tuple[bool, int, int]:
    # One-token rows first, because attention batches them; within each part the rows of an adapter
    # together and the deepest first, so that the rows that reach a layer are one slice.
    return (len(sequence.token_ids) > 1, sequence.slot, -sequence.depth)
