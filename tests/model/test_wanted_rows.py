"""What is left out of the last layer, and that only what nobody reads is."""

import pytest
import torch
from torch import Tensor

from server.errors import ModelError
from server.model.wanted_rows import WantedRows

ROWS = torch.tensor([1, 4])


class Counted:
    """A product that notes how many rows it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input: Tensor) -> Tensor:
        self.seen.append(input.shape[:-1].numel())
        return input[..., :2] + 1


def test_the_wanted_rows_alone_are_multiplied_after_the_last_attention() -> None:
    product, wanted, x = Counted(), WantedRows(ROWS, 5, num_layers=2), torch.randn(1, 5, 3)
    expected = product(x)
    for num_rows in (5, 5, 2):
        output = wanted.multiply(product, x)
        assert product.seen[-1] == num_rows
        assert output.shape == expected.shape
        assert torch.equal(output[:, ROWS], expected[:, ROWS])
        assert torch.equal(output, expected) == (num_rows == 5)
        if num_rows == 5:
            wanted.attended()
    assert not output[:, [0, 2, 3]].any()


@pytest.mark.parametrize("shape", [(5, 3), (1, 4, 3), (5, 1, 3), (2, 5, 3)])
def test_rows_that_may_be_others_are_multiplied_whole(shape: tuple[int, ...]) -> None:
    """As an expert's, which come in an order of its own."""
    product, wanted = Counted(), WantedRows(ROWS, 5, num_layers=1)
    wanted.attended()
    x = torch.randn(shape)
    assert torch.equal(wanted.multiply(product, x), product(x))


def test_attention_after_the_last_is_refused() -> None:
    wanted = WantedRows(ROWS, 5, num_layers=1)
    wanted.attended()
    with pytest.raises(ModelError, match="twice"):
        wanted.attended()
