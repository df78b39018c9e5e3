"""What a sweep holds at once, counted in the allocator's own events, beside the bound it states.

On a CPU. The bound is that of `boundary.sweep.sweep_slices`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from boundary.dataset import Sample
from boundary.progress import Progress, drain
from boundary.sample import token_ids
from boundary.sweep import sweep_slices
from server.bench.allocation import peak_bytes
from server.bench.shape import ModelShape

MAX_LOGITS = 1 << 20
"""Small, so that the hidden states are what is measured."""


@dataclass(frozen=True, slots=True)
class SweepMemory:
    """One sweep with one `max_tokens`.

    layer_evaluations: over those of one pass a depth; more than the least where samples had to be
        split, whose parts repeat the layers they share.
    """

    max_tokens: int
    peak_bytes: int
    bound_bytes: int
    layer_evaluations: float

    @property
    def is_within(self) -> bool:
        """Whether the bound held."""
        return self.peak_bytes <= self.bound_bytes


def measure_memory(
    model: PeftModel, shape: ModelShape, samples: Sequence[Sample], max_tokens: int
) -> SweepMemory:
    """Sweep all samples, in float32, in slices of `max_tokens`."""
    seen: list[Progress] = []
    slices = sweep_slices(model, samples, max_tokens=max_tokens, max_logits=MAX_LOGITS)
    peak = peak_bytes(lambda: drain(slices, on_progress=seen.append))
    longest = max(len(token_ids(sample)) for sample in samples)
    # One row of the longest sample is the least that can be run.
    bound = bound_bytes(shape, max(max_tokens, longest), longest, torch.float32.itemsize)
    one_a_depth = len(samples) * shape.num_layers * (shape.num_layers + 1)
    return SweepMemory(max_tokens, peak, bound, seen[-1].num_layer_evaluations / one_a_depth)


def bound_bytes(shape: ModelShape, num_tokens: int, longest: int, itemsize: int) -> int:
    """What `sweep_slices` states, without attention scores, which SDPA does not form."""
    width = 12 * shape.hidden_size + 4 * shape.intermediate_size + 2 * longest
    return num_tokens * itemsize * width + 16 * MAX_LOGITS
