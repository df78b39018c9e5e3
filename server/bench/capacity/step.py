"""What a step consists of, as far as its cost goes: read from the scheduler's own plan of it.

The same function looks at steps that an engine ran and at steps that a simulator plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.scheduled import Scheduled


@dataclass(frozen=True, slots=True)
class StepShape:
    """One step.

    decode_rows: sequences that compute one token. decode_pairs: keys that these read.
    prefill_rows: chunks of prompts. prefill_tokens: of all chunks. prefill_pairs: query-key pairs in them.
    lora_tokens: tokens, each times the share of the model's layers in which its LoRA applies.
    lora_adapters: distinct adapters, each times the share of its deepest row.
    """

    decode_rows: int = 0
    decode_pairs: int = 0
    prefill_rows: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    lora_tokens: float = 0.0
    lora_adapters: float = 0.0

    @property
    def num_tokens(self) -> int:
        """All that go through the model."""
        return self.decode_rows + self.prefill_tokens


def shape_of(scheduled: Sequence[Scheduled], num_layers: int) -> StepShape:
    """The shape of a step before it runs. Depths are counted in shares of `num_layers`."""
    decode_rows = decode_pairs = prefill_rows = prefill_tokens = prefill_pairs = 0
    lora_tokens = 0.0
    deepest: dict[int, int] = {}
    for item in scheduled:
        sequence, num_tokens = item.sequence, item.num_tokens
        start = sequence.num_computed
        if sequence.is_decoding:
            decode_rows += 1
            decode_pairs += start + 1
        else:
            prefill_rows += 1
            prefill_tokens += num_tokens
            prefill_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        lora = sequence.request.lora
        depth = lora.effective_depth
        if lora.adapter is not None and depth:
            lora_tokens += num_tokens * depth
            deepest[lora.adapter.uid] = max(deepest.get(lora.adapter.uid, 0), depth)
    return StepShape(
        decode_rows,
        decode_pairs,
        prefill_rows,
        prefill_tokens,
        prefill_pairs,
        lora_tokens / num_layers,
        sum(deepest.values()) / num_layers,
    )
