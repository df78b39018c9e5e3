"""A program that was noted for some rows runs with more, of which few are wanted, or says that it cannot.

The product stands for the last attention here: behind it only the wanted rows are computed.
"""

from array import array
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.native.structures import Pass
from server.model.replay import prompt_rows as module
from server.model.replay.program import Arena, Program
from server.model.replay.prompt_rows import prompt_rows
from server.model.replay.row_counts import RowCounts, row_counts
from server.model.replay.tape import noted_call
from tests.model.replay.noting import drawn_product, library, noted_twice
from tests.model.replay.test_chain import drawn

NUM_NOTED, MAX_ROWS = 5, 40
HEADS, WIDTH = 4, 16
FEATURES = HEADS * WIDTH

PRODUCT = drawn_product(FEATURES, FEATURES)

Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _as_the_runner_does(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "ATTENTION", "fathom_int8_product")
    with torch.inference_mode():
        yield


class Noted:
    """A function over the first rows of `memory`."""

    def __init__(self, function: Function, memory: Tensor) -> None:
        tapes, steps, results = noted_twice(function, memory, NUM_NOTED)
        counts = row_counts((tapes[0], tapes[1]), steps, NUM_NOTED)
        given = tapes[0].given
        self.found = prompt_rows(steps, given, results, NUM_NOTED, MAX_ROWS)
        self._told = Pass()
        if self.found is not None:
            self._counts = RowCounts(counts, NUM_NOTED, self.found.behind)
            own, room = self.found.among(steps[0]), self.found.room
            self._program = Program(own, given, results, library(), 2, Arena(), self._told, room)

    def run(self, num_rows: int, wanted: list[int]) -> Tensor:
        kept = array("q", wanted)
        self._counts.set(num_rows, len(wanted))
        self._told.wanted = None if len(wanted) == num_rows else kept.buffer_info()[0]
        self._told.num_wanted = len(wanted)
        return self._program.run()[0][: len(wanted)].clone()


def residual(x: Tensor) -> Tensor:
    """What was made before is read behind, too."""
    state = x * 2
    normed = state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6)
    return functional.silu(noted_call(PRODUCT, normed)) * state + state


def by_heads(x: Tensor) -> Tensor:
    """Rows between heads and what a head has, kept as they lie."""
    heads = (x + 1).view(1, -1, HEADS, WIDTH).transpose(1, 2)
    turned = torch.cat((-heads[..., WIDTH // 2 :], heads[..., : WIDTH // 2]), dim=-1)
    flat = (heads * 2 + turned).transpose(1, 2).reshape(-1, FEATURES)
    return (noted_call(PRODUCT, flat) + flat) * 2


@pytest.mark.parametrize("function", [residual, by_heads])
def test_the_wanted_rows_of_any_number(function: Function) -> None:
    memory = drawn(MAX_ROWS, FEATURES).float()
    noted = Noted(function, memory)
    steps = [
        (MAX_ROWS, [7, 8, 39]),
        (3, [0, 1, 2]),
        (30, [0, 29]),
        (30, [0, 1, 2, 3, 4]),
        (9, []),
        (2, [1]),
        (MAX_ROWS, [5, 6, 7, 38, 39]),
    ]
    for seed, (num_rows, wanted) in enumerate(steps):
        memory.copy_(drawn(*memory.shape, seed=seed))
        actual = noted.run(num_rows, wanted)
        torch.testing.assert_close(
            actual, function(memory[:num_rows])[wanted], rtol=1e-5, atol=1e-5
        )


def test_it_is_the_keeping_that_finds_them() -> None:
    """The control: without it the first rows come out."""
    memory = drawn(MAX_ROWS, FEATURES).float()
    noted = Noted(residual, memory)
    expected = residual(memory[:20])
    noted._told.wanted = None
    noted._counts.set(20, 2)
    actual = noted._program.run()[0][:2]
    torch.testing.assert_close(actual, expected[:2], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(actual, expected[[10, 19]], atol=1e-3).all(dim=1).any()


def test_nothing_is_computed_for_the_others() -> None:
    memory = drawn(MAX_ROWS, FEATURES).float()
    noted = Noted(residual, memory)
    noted.run(NUM_NOTED, list(range(NUM_NOTED)))
    before = noted._program.run()[0].clone()
    memory.neg_()
    noted.run(MAX_ROWS, [3])
    assert torch.equal(noted._program._results[0]()[1:], before[1:])


def head_by_head(x: Tensor) -> Tensor:
    """All rows of a head, then those of the next: a row more moves the others."""
    heads = (x + 1).view(1, -1, HEADS, WIDTH).transpose(1, 2)
    kept = torch.cat((heads[..., : WIDTH // 2] * 2, heads[..., WIDTH // 2 :]), dim=-1)
    flat = (heads * 2).transpose(1, 2).reshape(-1, FEATURES)
    mixed = noted_call(PRODUCT, flat).view(1, -1, HEADS, WIDTH).transpose(1, 2)
    return (mixed + kept).transpose(1, 2)[0]


def given_read_behind(x: Tensor) -> Tensor:
    return noted_call(PRODUCT, x * 2) + x


TABLE = drawn(NUM_NOTED + 1, FEATURES, seed=3).float()


def short_table(x: Tensor) -> Tensor:
    return noted_call(PRODUCT, x + TABLE[: len(x)]) * 2


@pytest.mark.parametrize("function", [head_by_head, given_read_behind, short_table])
def test_who_has_no_more_rows_is_left_to_decode_rows(function: Function) -> None:
    assert Noted(function, drawn(MAX_ROWS, FEATURES).float()).found is None


def test_a_pass_without_attention_is_left_to_decode_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = drawn(MAX_ROWS, FEATURES).float()
    assert Noted(residual, memory).found is not None
    monkeypatch.setattr(module, "ATTENTION", "fathom_attention_layer")
    assert Noted(residual, memory).found is None
