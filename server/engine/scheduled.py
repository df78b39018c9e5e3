"""A sequence's part in one step: what the scheduler chose, the runner computes and the engine takes up.

What it says holds for the sequence as it stood when the step was scheduled.
"""

from dataclasses import dataclass
from typing import Self

from server.engine.sequence import Sequence
from server.model.batch import BatchedSequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's part in the next step: its next `num_tokens` uncomputed tokens."""

    sequence: Sequence
    num_tokens: int
    is_last_chunk: bool
    """Whether every token of the sequence is computed after this step."""
    num_logits: int
    """How many of its last tokens need logits: all to score a prompt, else one to go on."""

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Self:
        """As the sequence stands now."""
        is_last_chunk = num_tokens == sequence.num_to_compute
        num_logits = int(is_last_chunk and sequence.request.sampling.max_tokens > 0)
        if sequence.wants_prompt_logprobs:
            num_logits = num_tokens
        return cls(sequence, num_tokens, is_last_chunk, num_logits)

    def halves(self) -> "list[Scheduled]":
        """The same in two steps, of two tokens or more."""
        half = self.num_tokens // 2
        rest = self.num_tokens - half
        first_logits, last_logits = 0, self.num_logits
        if self.sequence.wants_prompt_logprobs:
            first_logits, last_logits = half, rest
        return [
            Scheduled(self.sequence, half, is_last_chunk=False, num_logits=first_logits),
            Scheduled(self.sequence, rest, self.is_last_chunk, last_logits),
        ]

    def batched(self) -> BatchedSequence:
        """The same for the runner."""
        sequence = self.sequence
        start = sequence.num_computed
        return BatchedSequence(
            token_ids=sequence.token_ids[start : start + self.num_tokens],
            start=start,
            block_table=sequence.block_table,
            slot=sequence.slot,
            depth=sequence.request.lora.effective_depth,
            num_logits=self.num_logits,
        )
