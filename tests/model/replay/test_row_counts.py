"""A program that was noted for some rows runs with fewer of them, or says why it cannot."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.native.structures import Pass
from server.model.replay.program import Arena, Program
from server.model.replay.row_counts import NotByRows, RowCounts, row_counts
from server.model.replay.tape import noted_call
from tests.model.replay.noting import drawn_product, library, noted_twice
from tests.model.replay.test_chain import drawn

NUM_ROWS = 12
"""As many as there are heads below, so that a size alone does not say what is a row."""
HEADS, WIDTH = 12, 16

Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _as_the_runner_does() -> Iterator[None]:
    with torch.inference_mode():
        yield


def noted(function: Function, memory: Tensor) -> tuple[Program, RowCounts]:
    """Over the first rows of `memory`, which has one more than `NUM_ROWS`."""
    tapes, steps, results = noted_twice(function, memory, NUM_ROWS)
    counts = RowCounts(row_counts((tapes[0], tapes[1]), steps, NUM_ROWS), NUM_ROWS)
    program = Program(steps[0], tapes[0].given, results, library(), 1, Arena(), Pass())
    return program, counts


PRODUCT = drawn_product(HEADS * WIDTH, HEADS * WIDTH)


def by_heads(x: Tensor) -> Tensor:
    """Rows between heads and what a head has, as rotary embeddings see them."""
    whole = noted_call(PRODUCT, x)
    heads = whole.view(1, -1, HEADS, WIDTH).transpose(1, 2)
    half = WIDTH // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    kept = torch.cat((heads[..., :half] * 2, heads[..., half:]), dim=-1)  # laid out head by head
    return (kept + turned).transpose(1, 2)[0] + 1


def gated(x: Tensor) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return functional.silu(noted_call(PRODUCT, normed)) * x + x


@pytest.mark.parametrize("function", [gated, by_heads])
def test_the_first_rows_are_what_they_are_by_themselves(function: Function) -> None:
    memory = drawn(NUM_ROWS + 1, HEADS * WIDTH).float()
    program, counts = noted(function, memory)
    for num_rows in (1, 5, NUM_ROWS, 2, NUM_ROWS - 1):
        memory.copy_(drawn(*memory.shape, seed=num_rows))
        counts.set(num_rows)
        (result,) = program.run()
        expected = function(memory[:num_rows])
        torch.testing.assert_close(result[:num_rows], expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_done_for_the_others() -> None:
    memory = drawn(NUM_ROWS + 1, HEADS * WIDTH).float()
    program, counts = noted(gated, memory)
    (result,) = program.run()
    before = result.clone()
    memory.neg_()
    counts.set(4)
    (result,) = program.run()
    assert torch.equal(result[4:], before[4:])
    counts.set(NUM_ROWS)  # the control
    (result,) = program.run()
    assert not torch.isclose(result[4:], before[4:]).all(dim=1).any()


TWICE = drawn(2, 1, HEADS * WIDTH, seed=5).float()
OF_EACH_PASS = [drawn(HEADS * WIDTH, seed=seed).float() for seed in range(2)]


def centred(x: Tensor) -> Tensor:
    means = x.mean(-1, keepdim=True).squeeze(-1)  # a vector of rows
    return means - means.mean(-1, keepdim=True)


REFUSED: list[tuple[str, Function]] = [
    ("not all of its steps", lambda x: torch.sort(x * 2, dim=-1)[0]),
    ("told the number of rows", lambda x: x.new_zeros(len(x), 1) + x),
    ("is another number", centred),
    ("other values", lambda x: x * x[-1]),
    ("not one dimension", lambda x: x.unsqueeze(1) * x),
    ("one after the other", lambda x: noted_call(PRODUCT, x * TWICE)),
    ("other tensors", lambda x: x * OF_EACH_PASS[len(x) - NUM_ROWS]),
]


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_who_mixes_rows_is_refused(reason: str, function: Function) -> None:
    with pytest.raises(NotByRows, match=reason):
        noted(function, drawn(NUM_ROWS + 1, HEADS * WIDTH).float())
