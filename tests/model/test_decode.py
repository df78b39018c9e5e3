"""A decode step's standing inputs: attention over them is that of the step they were filled with."""

import pytest
import torch

from server.errors import ModelError
from server.model.attention import AttentionVariant
from server.model.batch import BatchedSequence
from server.model.decode import DecodeInputs, Fed
from server.model.decode_attention import DecodeAttention, GatheredDecode
from server.model.kv_cache import KVCache, KVSpec
from server.model.sdpa import AttentionStep
from tests.model.test_varlen import sequence

CPU = torch.device("cpu")
SPEC = KVSpec(num_kv_heads=2, key_dim=8, value_dim=8)
NUM_BLOCKS, SIZE = 12, 4
BATCHES = [
    [sequence(1, 6, [3, 1])],
    [sequence(1, 6, [3, 1]), sequence(1, 2, [0]), sequence(1, 0, [5])],
    [sequence(1, 12, [7, 2, 9, 4]), sequence(1, 4, [10, 6]), sequence(1, 3, [8])],
]
"""One after the other through the same inputs: of the first, nothing may be left in the last."""
BEGUN = (4, 5, 6)
"""Blocks whose first token is one of these steps': SDPA's clears them, Triton's never reads them."""
OTHERS = [block for block in range(NUM_BLOCKS) if block not in BEGUN]


def made_cache(*, has_scratch: bool) -> KVCache:
    """Random history; blocks that nobody filled hold NaN."""
    cache = KVCache([SPEC], NUM_BLOCKS, SIZE, torch.float32, CPU, has_scratch=has_scratch)
    generator = torch.Generator().manual_seed(0)
    for pool in (cache.keys[0], cache.values[0]):
        pool[:NUM_BLOCKS] = torch.randn(pool[:NUM_BLOCKS].shape, generator=generator)
        pool[[*BEGUN, 11]] = torch.nan
    return cache


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_attention_over_filled_inputs_is_the_steps(name: str, window: int | None) -> None:
    kernel: type[DecodeAttention] = GatheredDecode
    if name == "triton":
        pytest.importorskip("triton", reason="no triton: its kernel is not tested")
        from server.model.triton_attention import TritonDecode

        kernel = TritonDecode
    recorded, plain = made_cache(has_scratch=True), made_cache(has_scratch=False)
    inputs = DecodeInputs(recorded, 8, 5, CPU, kernel)
    variant = AttentionVariant(0.3, sliding_window=window)
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        query = torch.randn(4, 6, 8, generator=generator)
        key, value = torch.randn(2, 4, 2, 8, generator=generator)
        inputs.fill(batch, 4)
        actual = inputs.attention(4, 5).attend(0, query, key, value, variant)
        num_own = len(batch)
        expected = AttentionStep.build(plain, batch, CPU).attend(
            0, query[:num_own], key[:num_own], value[:num_own], variant
        )
        torch.testing.assert_close(actual[:num_own], expected)
        assert actual.isfinite().all()  # rows of nobody, too
        for ours, theirs in ((recorded.keys, plain.keys), (recorded.values, plain.values)):
            assert torch.equal(ours[0][OTHERS].nan_to_num(9e9), theirs[0][OTHERS].nan_to_num(9e9))


def test_rows_of_nobody_carry_the_base_model() -> None:
    inputs = DecodeInputs(made_cache(has_scratch=True), max_rows=8, max_blocks=5, device=CPU)
    full = [BatchedSequence([7], 5, [1, 2], slot, depth, 1) for slot, depth in ((0, 4), (2, 1))]
    inputs.fill(full * 4, 8)
    inputs.fill(full[1:], 4)
    rows = inputs.adapters(4)
    assert rows.slots.tolist() == [2, -1, -1, -1]
    assert rows.depths.tolist() == [1, 0, 0, 0]
    assert inputs.token_ids(4).tolist() == [[7, 0, 0, 0]]
    assert inputs.positions(4).tolist() == [[5, 0, 0, 0]]


def test_tokens_may_come_from_the_device() -> None:
    inputs = DecodeInputs(made_cache(has_scratch=True), max_rows=4, max_blocks=5, device=CPU)
    address = inputs.token_ids(4).data_ptr()
    inputs.fill(BATCHES[1], 4, Fed(torch.tensor([50, 60, 70, 80]), [3, 0, 2]))
    assert inputs.token_ids(4).tolist() == [[80, 50, 70, 0]]
    assert inputs.token_ids(4).data_ptr() == address


def test_a_cache_needs_a_block_for_rows_of_nobody() -> None:
    with pytest.raises(ModelError, match="scratch"):
        DecodeInputs(made_cache(has_scratch=False), max_rows=4, max_blocks=5, device=CPU)
