"""Packed steps against transformers' own forward pass: whatever the packing, the logits are the same."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from server.model import context
from server.model.batch import BatchedSequence
from server.model.kv_cache import KVCache
from server.model.runner import ModelRunner
from tests.parity.zoo import VOCAB_SIZE, random_prompt
from tests.tiny import Tiny, num_hooks

PROMPTS = tuple(random_prompt(length, seed=length) for length in (19, 8, 1, 13))
ATOL = 1e-4


@pytest.fixture
def runner(tiny: Tiny) -> Iterator[ModelRunner]:
    model = tiny.base.model
    cache = KVCache(tiny.base.kv_specs, 32, 4, model.dtype, model.device)
    made = ModelRunner(model, cache, tiny.targets, max_loras=2)
    yield made
    made.close()
    assert num_hooks(model) == 0


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[Tensor]:
    """Every prompt's logits, `[num_tokens, vocab_size]`, from eager attention without a cache."""
    model = tiny.base.model
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [model(torch.tensor([p]), use_cache=False).logits[0] for p in PROMPTS]
    finally:
        model.set_attn_implementation("fathom_paged")


def part(index: int, start: int, end: int, num_logits: int) -> BatchedSequence:
    """Tokens `start..end` of a prompt, in blocks of its own, not in their order."""
    blocks = list(range(8 * index, 8 * index + 8))[::-1]
    return BatchedSequence(list(PROMPTS[index][start:end]), start, blocks, -1, 0, num_logits)


def check(
    runner: ModelRunner, batch: list[tuple[int, BatchedSequence]], expected: list[Tensor]
) -> None:
    """Run `(prompt, part)`s and compare every row of logits with the one it says it is."""
    logits, order = runner.run([sequence for _, sequence in batch])
    assert sorted(order) == list(range(len(batch)))
    row = 0
    for index, sequence in (batch[place] for place in order):
        end = sequence.num_kv_tokens
        wanted = expected[index][end - sequence.num_logits : end]
        actual = logits[row : row + sequence.num_logits]
        assert torch.allclose(actual, wanted, atol=ATOL)
        row += sequence.num_logits
    assert logits.shape == (row, VOCAB_SIZE)


def test_prompts_side_by_side(runner: ModelRunner, expected: list[Tensor]) -> None:
    check(runner, [(i, part(i, 0, len(p), len(p))) for i, p in enumerate(PROMPTS)], expected)


@pytest.mark.parametrize("num_logits", [0, 1, 3])
def test_only_the_wanted_rows_are_returned(
    runner: ModelRunner, expected: list[Tensor], num_logits: int
) -> None:
    batch = [(0, part(0, 0, 19, num_logits)), (1, part(1, 0, 8, 2)), (2, part(2, 0, 1, 0))]
    check(runner, batch, expected)


def test_a_step_may_want_no_logits(runner: ModelRunner, expected: list[Tensor]) -> None:
    check(runner, [(0, part(0, 0, 19, 0))], expected)


@pytest.mark.parametrize("cuts", [(0, 4, 19), (0, 1, 2, 3, 19), (0, 18, 19), (0, *range(5, 20))])
def test_chunks_and_single_tokens_beside_others(
    runner: ModelRunner, expected: list[Tensor], cuts: tuple[int, ...]
) -> None:
    """One prompt in pieces, the second token by token beside it, a third once."""
    others = [(3, part(3, 0, 13, 13))]
    for number, (start, end) in enumerate(pairwise(cuts)):
        batch = [(0, part(0, start, end, end - start)), *others]
        if number < len(PROMPTS[1]):
            batch.append((1, part(1, number, number + 1, 1)))
        others = []
        check(runner, batch, expected)


def test_the_order_is_single_tokens_then_adapters_then_depth(runner: ModelRunner) -> None:
    def row(num_tokens: int, slot: int, depth: int) -> BatchedSequence:
        return BatchedSequence([1] * num_tokens, 0, [0], slot, depth, 1)

    batch = [row(2, 0, 1), row(1, 1, 4), row(2, 0, 3), row(1, -1, 0), row(2, -1, 0), row(1, 1, 2)]
    assert runner.run(batch)[1] == [3, 1, 5, 4, 2, 0]


def test_running_again_changes_nothing(runner: ModelRunner, expected: list[Tensor]) -> None:
    """A failed step is run again one by one, over the same blocks."""
    for _ in range(2):
        check(runner, [(0, part(0, 0, 9, 9)), (1, part(1, 0, 8, 8))], expected)
    for _ in range(2):
        check(runner, [(0, part(0, 9, 19, 10))], expected)


def test_the_control_another_block_table_is_another_result(
    runner: ModelRunner, expected: list[Tensor]
) -> None:
    runner.run([part(0, 0, 9, 0)])
    moved = part(0, 9, 19, 1)
    moved.block_table.reverse()
    logits, _ = runner.run([moved])
    assert not torch.allclose(logits, expected[0][-1:], atol=1e-2)


def test_nothing_is_left_of_a_step(tiny: Tiny, runner: ModelRunner) -> None:
    tiny_state = {name: t.clone() for name, t in tiny.base.model.state_dict().items()}
    runner.run([part(0, 0, 19, 1)])
    with pytest.raises(LookupError):
        context.current()
    for name, tensor in tiny.base.model.state_dict().items():
        assert torch.equal(tensor, tiny_state[name])
