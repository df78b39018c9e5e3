"""A sample as every score sees it: the token ids of a prompt and of what should follow it.

Anything that has them is one, such as `dataset.Sample`, which also has the texts. Knows no tensor.
"""

from collections.abc import Sequence
from typing import Protocol


class Sample(Protocol):
    """A prompt and what should follow it, which may be nothing for scores without labels."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """At least one token."""

    @property
    def completion_token_ids(self) -> Sequence[int]:
        """What should follow."""


def token_ids(sample: Sample) -> list[int]:
    """Prompt and completion, as the model reads them."""
    return [*sample.prompt_token_ids, *sample.completion_token_ids]


def completion_positions(sample: Sample) -> range:
    """Positions whose logits predict the completion, from the prompt's last token on."""
    first = len(sample.prompt_token_ids) - 1
    return range(first, first + len(sample.completion_token_ids))


def every_position(sample: Sample) -> range:
    """All positions of prompt and completion."""
    return range(len(token_ids(sample)))


def usual_max_tokens(samples: Sequence[Sample]) -> int:
    """How long a generated text may become: the longest completion and a quarter more."""
    longest = max(len(sample.completion_token_ids) for sample in samples)
    return longest + max(16, longest // 4)
