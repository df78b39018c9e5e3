"""One step's rows: what the engine hands to the runner. No requests, no text."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchedSequence:
    """A run of consecutive tokens of one sequence, computed in one step."""

    token_ids: list[int]
    start: int
    """Position of the first of them; everything before is in the KV cache."""
    block_table: list[int]
    """Physical block of each logical block, covering `start + len(token_ids)` tokens."""
    slot: int
    """Device slot of the adapter; -1 is the base model."""
    depth: int
    """Layers below this one apply the LoRA of `slot`; 0 for the base model."""
    num_logits: int
    """Logits are wanted for this many of the last tokens."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens the last of these attends to, itself included."""
        return self.start + len(self.token_ids)
