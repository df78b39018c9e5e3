"""One step's rows: what the engine hands to the runner. No requests, no text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


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


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a batch, one a token, in its order."""

    token_ids: list[int]
    positions: list[int]
    wanted: list[int]
    """Rows whose logits are wanted, rising."""
    are_decodes: bool
    """Whether each is a sequence of its own, and wanted."""

    @classmethod
    def of(cls, batch: Sequence[BatchedSequence]) -> Self:
        """Of one batch."""
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for sequence in batch:
            token_ids.extend(sequence.token_ids)
            positions.extend(range(sequence.start, sequence.num_kv_tokens))
            wanted.extend(range(len(token_ids) - sequence.num_logits, len(token_ids)))
        are_decodes = len(batch) == len(token_ids) == len(wanted)
        return cls(token_ids, positions, wanted, are_decodes)
