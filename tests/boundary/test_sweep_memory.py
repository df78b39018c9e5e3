"""The sweep's memory, counted in the allocator's own events: bounded, however many the samples."""

import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from boundary.score import LOG_LIKELIHOOD, KLToFull, Score
from boundary.sweep import sweep, sweep_slices
from tests.boundary.adapted import Sample, samples_of
from tests.parity.adapters import expected_peft_warnings, spread_adapter
from tests.parity.zoo import VOCAB_SIZE, seeded

HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS = 64, 4, 3
NUM_DEPTHS = NUM_LAYERS + 1
MAX_LOGITS = 8 * NUM_DEPTHS * VOCAB_SIZE


def build(attention: str, dtype: torch.dtype, intermediate_size: int) -> PeftModel:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=intermediate_size,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        attn_implementation=attention,
    )
    with seeded(0), expected_peft_warnings():
        lora = LoraConfig(r=4, target_modules="all-linear")
        model = get_peft_model(LlamaForCausalLM(config), lora)
        spread_adapter(model)
    return model.to(dtype).eval()


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes by which the allocator's total changed, event by event, once the block has ended."""
    changes: list[int] = []
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield changes
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    changes += [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def peak_bytes(
    model: PeftModel, samples: Sequence[Sample], max_tokens: int, score: Score = LOG_LIKELIHOOD
) -> int:
    """The most that a sweep held at once; all of it is given back."""
    with allocations() as changes:
        sweep(model, samples, score=score, max_tokens=max_tokens, max_logits=MAX_LOGITS)
    totals = list(itertools.accumulate(changes))
    assert totals[-1] == 0
    return max(totals)


def bound(model: PeftModel, num_tokens: int, longest: int) -> int:
    """What the docstring of `sweep_slices` states."""
    config = model.get_base_model().config
    width = 12 * HIDDEN_SIZE + 4 * config.intermediate_size + 2 * longest
    found: int = num_tokens * model.dtype.itemsize * width + 16 * MAX_LOGITS
    if config._attn_implementation == "eager":
        found += 12 * num_tokens * NUM_HEADS * longest
    return found


@pytest.mark.parametrize("score", [LOG_LIKELIHOOD, KLToFull()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("attention", "intermediate_size", "longest"),
    [("sdpa", 16, 40), ("sdpa", 256, 40), ("eager", 16, 40), ("eager", 16, 160), ("sdpa", 16, 160)],
)
def test_a_sweep_stays_below_its_bound(
    attention: str, intermediate_size: int, longest: int, dtype: torch.dtype, score: Score
) -> None:
    model = build(attention, dtype, intermediate_size)
    max_tokens = 2 * (NUM_DEPTHS + score.needs_full) * longest
    half = longest // 2
    samples = samples_of((half, half), (half - 1, half), (half, half), (half - 2, half))
    peak = peak_bytes(model, samples, max_tokens, score)
    stated = bound(model, max_tokens, longest)
    assert 0.25 * stated < peak < stated  # a bound, and one that says something


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_twenty_times_the_samples_take_no_more(attention: str) -> None:
    model = build(attention, torch.float32, 96)
    max_tokens, longest = 2 * NUM_DEPTHS * 40, 40
    lengths = [(20, 20), (17, 20), (10, 8), (20, 19)]
    few = peak_bytes(model, samples_of(*lengths), max_tokens)
    many = peak_bytes(model, samples_of(*lengths * 20), max_tokens)
    assert many < 1.02 * few
    # Negative control: all at once is more than is stated for these, by far.
    all_at_once = peak_bytes(model, samples_of(*lengths * 20), 10**9)
    assert all_at_once > 5 * bound(model, max_tokens, longest)


def test_half_the_tokens_take_half_the_memory() -> None:
    model = build("sdpa", torch.float32, 96)
    samples = samples_of(*[(20, 20)] * 16)
    peaks = [
        peak_bytes(model, samples, num_samples * NUM_DEPTHS * 40) for num_samples in (16, 8, 4, 2)
    ]
    for larger, smaller in itertools.pairwise(peaks):
        assert 0.48 < smaller / larger < 0.55


def test_a_sample_in_parts_takes_what_a_part_does() -> None:
    model = build("sdpa", torch.float32, 96)
    (sample,) = samples_of((40, 40))
    peak = peak_bytes(model, [sample], max_tokens=1)
    assert peak < bound(model, num_tokens=80, longest=80)


def test_between_slices_a_sweep_holds_no_tensor() -> None:
    model = build("sdpa", torch.float32, 96)
    slices = sweep_slices(model, samples_of(*[(20, 20)] * 4), max_tokens=NUM_DEPTHS * 40)
    next(slices)
    with allocations() as changes:
        next(slices), next(slices)
    assert changes
    assert sum(changes) == 0
