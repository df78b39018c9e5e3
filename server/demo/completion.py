"""Samples as tensors: a padded batch in which only the completion's tokens count for the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from server.demo.samples import Sample

IGNORED = -100
"""The label that the loss of transformers leaves out."""


@dataclass(frozen=True)
class Batch:
    """int64 `[num_samples, max_length]` each, padded on the right."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def plain_ids(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of (`bos` prompt) and of (completion `eos`), as a completions request would see
    them.
    """
    completion = tokenizer.encode(sample.completion, add_special_tokens=False)
    return tokenizer.encode(sample.prompt), [*completion, tokenizer.eos_token_id]


def chat_ids(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The same with the prompt as a user's turn and the completion as the assistant's."""
    prompt = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.prompt}], tokenize=False, add_generation_prompt=True
        )
    )
    completion = tokenizer.encode(sample.completion.strip(), add_special_tokens=False)
    return (
        tokenizer.encode(prompt, add_special_tokens=False),
        [*completion, tokenizer.eos_token_id],
    )


def as_batch(pairs: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """Pairs of (prompt ids, completion ids) as one batch."""
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.full((len(pairs), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return Batch(input_ids, attention_mask, labels)
