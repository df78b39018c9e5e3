"""What is noted of a pass, and what cannot be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.replay.tape import NotReplayable, Tape, TapeWriter


@torch.inference_mode()
def tape_of(function: Callable[..., object], *given: Tensor) -> Tape:
    writer = TapeWriter()
    with writer:
        function(*given)
    return writer.tape


def names(tape: Tape) -> list[str]:
    return [str(call.function).removeprefix("aten.") for call in tape.calls]


def test_views_are_no_calls() -> None:
    def function(x: Tensor) -> Tensor:
        return x.view(4, 6).transpose(0, 1)[:3].unsqueeze(0).expand(2, 3, 4) * 2

    assert names(tape_of(function, torch.ones(24))) == ["mul.Tensor"]


def test_a_value_says_where_its_view_lies() -> None:
    (call,) = tape_of(lambda x: x[1:, 2:5] * 1, torch.ones(4, 6)).calls
    (value,) = call.inputs
    assert (value.size, value.stride, value.offset) == ((3, 3), (6, 1), 8)


def test_views_of_one_memory_share_its_root() -> None:
    def function(x: Tensor) -> Tensor:
        doubled = x * 2
        return doubled[:2] + doubled[2:]

    first, second = tape_of(function, torch.ones(4)).calls
    assert [value.root for value in second.inputs] == [first.outputs[0].root] * 2  # type: ignore[union-attr]


def test_a_copy_is_a_call_where_a_view_would_not_do() -> None:
    assert names(tape_of(lambda x: x.t().reshape(-1), torch.ones(2, 3))) == ["reshape.default"]


def test_what_is_changed_in_place_is_a_call() -> None:
    assert names(tape_of(lambda x: x.add_(1), torch.ones(3))) == ["add_.Tensor"]


def test_dropout_that_drops_nothing_is_no_call() -> None:
    assert names(tape_of(lambda x: functional.dropout(x, 0.5, training=False), torch.ones(3))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.max() > 0 else x,
        lambda x: x * x[0].item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.unique(x),
        lambda x: torch.rand(3),
        lambda x: functional.dropout(x, 0.5, training=True),
        lambda x: torch.bernoulli(x),
    ],
    ids=[
        "branch", "item", "nonzero", "bool index", "masked select", "unique", "rand", "dropout",
        "bernoulli",
    ],
)  # fmt: skip
def test_a_pass_that_looks_at_numbers_or_draws_them_is_refused(
    function: Callable[[Tensor], object],
) -> None:
    with pytest.raises(NotReplayable):
        tape_of(function, torch.tensor([0.5, 0.25, 1.0]))
