"""Scores of one position's logits: the log-likelihood of the ground truth, the distance from full.

What the sweep and its plain reference compute of logits; both take the mean over a sample's
positions. Knows no model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from boundary.sample import Sample, completion_positions, every_position


class Score(Protocol):
    """One number for each position of a sample, of which the sample's score is the mean."""

    @property
    def needs_full(self) -> bool:
        """Whether `values` compares with the full adapter's logits."""

    def positions(self, sample: Sample) -> range:
        """The positions that count."""

    def values(self, logits: Tensor, next_token_ids: Tensor, full_logits: Tensor) -> Tensor:
        """`[num_masks, num_positions]` float32.

        logits `[num_masks, num_positions, vocab_size]`, in the model's dtype. next_token_ids int64
        `[num_positions]`: the token after each position, -1 after the last one. full_logits
        `[num_positions, vocab_size]`: the full adapter's, if `needs_full`, else of no meaning.
        """


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Mean log-probability of the ground-truth completion's tokens: greater is better."""

    needs_full: bool = False

    def positions(self, sample: Sample) -> range:
        """Where the completion is predicted."""
        return completion_positions(sample)

    def values(self, logits: Tensor, next_token_ids: Tensor, full_logits: Tensor) -> Tensor:
        """`log softmax(logits)[next token]`"""
        indices = next_token_ids.expand(logits.shape[:-1]).unsqueeze(-1)
        chosen = logits.gather(-1, indices).squeeze(-1).float()
        return chosen - torch.logsumexp(logits.float(), dim=-1)


@dataclass(frozen=True, slots=True)
class KLToFull:
    """Mean `KL(full || masked)` of the next token's distributions: 0 is the full adapter itself.

    Without labels: on every position of prompts alone or of transcripts, or on those given, such as
    `completion_positions` of transcripts.
    """

    where: Callable[[Sample], range] = every_position
    needs_full: bool = True

    def positions(self, sample: Sample) -> range:
        """The positions given."""
        return self.where(sample)

    def values(self, logits: Tensor, next_token_ids: Tensor, full_logits: Tensor) -> Tensor:
        """`sum_v p_full(v) (log p_full(v) - log p(v))`"""
        full = torch.log_softmax(full_logits.float(), dim=-1)
        masked = torch.log_softmax(logits.float(), dim=-1)
        # Rounding may take a distance of nothing below zero.
        return (full.exp() * (full - masked)).sum(dim=-1).clamp_min(0)


LOG_LIKELIHOOD = LogLikelihood()
