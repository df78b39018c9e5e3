"""Packed Linears compute what plain ones do, for few different numbers of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import packed

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.skipif(
    not packed.is_available(torch.device("cpu"), torch.float32), reason="this torch cannot pack"
)


class RowCounts(TorchDispatchMode):
    """Notes how many rows each packed product has: oneDNN keeps kernels for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def pair(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same Linear, plain and packed."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()})
    assert packed.pack(model) == 1  # type: ignore[arg-type]
    linear = model[0]
    assert isinstance(linear, packed.PackedLinear)
    return plain, linear


@contextmanager
def counted() -> Iterator[set[int]]:
    with torch.inference_mode(), RowCounts() as counts:
        yield counts.seen


def run(linear: Callable[[Tensor], Tensor], num_rows: int) -> None:
    linear(torch.zeros(1, num_rows, 24))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (9,), (1, 16), (1, 17), (3, 23), (1, 130)])
@torch.inference_mode()
def test_a_packed_linear_equals_a_plain_one(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    plain, linear = pair(dtype, bias=bias)
    x = torch.randn(*shape, 24, dtype=dtype)
    output = linear(x)
    assert output.is_contiguous()
    assert output.shape == (*shape, 40)
    torch.testing.assert_close(
        output, plain(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_stride=False
    )


def test_padding_adds_less_than_an_eighth_and_nothing_to_what_is_padded() -> None:
    for num_rows in range(1, 5000):
        to = packed.padded(num_rows)
        assert num_rows <= to < num_rows * 1.125
        assert packed.padded(to) == to
    assert [packed.padded(n) for n in (0, 1, 5, 9, 16, 17, 512)] == [0, 1, 5, 9, 16, 18, 512]


def test_steps_of_every_size_multiply_few_different_numbers_of_rows() -> None:
    _, linear = pair(torch.float32, bias=False)
    with counted() as seen:
        for num_rows in range(1, 513):
            run(linear, num_rows)
    assert len(seen) == 56


def test_without_padding_every_size_would_be_a_number_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "padded", lambda num_rows: num_rows)
    _, linear = pair(torch.float32, bias=False)
    with counted() as seen:
        for num_rows in range(1, 65):
            run(linear, num_rows)
    assert len(seen) == 64
