"""Packed Linears compute what plain ones do, for few different numbers of rows."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import packed
from server.model.replay.tape import noting
from server.model.siblings import find_siblings

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.skipif(
    not packed.is_available(torch.device("cpu"), torch.float32), reason="this torch cannot pack"
)


@pytest.fixture(params=["kernel", "onednn"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who multiplies, whoever is faster here; only the kernel has bfloat16 on every processor."""
    monkeypatch.setattr(packed.native, "is_fastest", lambda dtype: request.param == "kernel")
    return str(request.param)


def assert_multiplied_by(kind: str, linear: packed.PackedLinear, dtype: torch.dtype) -> None:
    is_kernel = kind == "kernel" or not packed.has_onednn(dtype)
    assert type(linear.product) is (packed.NativelyPacked if is_kernel else packed.OneDnnPacked)


class RowCounts(TorchDispatchMode):
    """Notes how many rows each packed product has: oneDNN keeps kernels for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.add(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def pair(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same Linear, plain and packed."""
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()})
    assert packed.pack(model) == 1
    linear = model[0]
    assert isinstance(linear, packed.PackedLinear)
    return plain, linear


class Products:
    """Counts packed products; a `tape.CallNoter`."""

    def __init__(self) -> None:
        self.num = 0

    def call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        self.num += 1
        return function(*args)


@contextmanager
def counted_products() -> Iterator[Products]:
    products = Products()
    with noting(products):
        yield products


@contextmanager
def counted() -> Iterator[set[int]]:
    with torch.inference_mode(), RowCounts() as counts:
        yield counts.seen


@pytest.fixture
def multiplied_by_onednn(monkeypatch: pytest.MonkeyPatch) -> packed.PackedLinear:
    """24 inputs, whoever is faster here."""
    monkeypatch.setattr(packed.native, "is_fastest", lambda dtype: False)
    return pair(torch.float32, bias=False)[1]


def run(linear: Callable[[Tensor], Tensor], num_rows: int) -> None:
    linear(torch.zeros(1, num_rows, 24))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (9,), (1, 16), (1, 17), (3, 23), (1, 130)])
@torch.inference_mode()
def test_a_packed_linear_equals_a_plain_one(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, kind: str
) -> None:
    plain, linear = pair(dtype, bias=bias)
    assert_multiplied_by(kind, linear, dtype)
    x = torch.randn(*shape, 24, dtype=dtype)
    output = linear(x)
    assert output.is_contiguous()
    assert output.shape == (*shape, 40)
    torch.testing.assert_close(
        output, plain(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_stride=False
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_rows", [1, 9, 16, 17])
@torch.inference_mode()
def test_linears_of_one_input_are_one_product(
    num_rows: int, dtype: torch.dtype, bias: bool, kind: str
) -> None:
    torch.manual_seed(0)
    plain = [nn.Linear(24, width, bias=bias, dtype=dtype) for width in (40, 16, 8)]
    model = nn.ModuleList(copy.deepcopy(plain))
    members = [module for module in model if isinstance(module, nn.Linear)]
    assert packed.pack(model, [members]) == 3
    assert isinstance(members[0], packed.PackedLinear)
    assert_multiplied_by(kind, members[0], dtype)
    for module, linear in zip(members, plain, strict=True):
        assert torch.equal(module.weight, linear.weight)
    x, other = torch.randn(2, 1, num_rows, 24, dtype=dtype)
    # In order, as a model asks; out of order; and with another input in between.
    asked = [(0, x), (1, x), (2, x), (2, x), (0, x), (1, x), (0, other), (1, x), (1, other)]
    with counted_products() as products:
        for index, rows in asked:
            torch.testing.assert_close(
                members[index](rows), plain[index](rows), rtol=0.02, atol=TOLERANCE[dtype]
            )
    assert products.num == 2 + 3  # nine without sharing


@torch.inference_mode()
def test_what_a_reader_changes_in_its_columns_is_its_own() -> None:
    plain = [nn.Linear(24, 40), nn.Linear(24, 16)]
    model = nn.ModuleList(copy.deepcopy(plain))
    packed.pack(model, [[m for m in model if isinstance(m, nn.Linear)]])
    x = torch.randn(1, 5, 24)
    model[0](x).fill_(7)
    torch.testing.assert_close(model[1](x), plain[1](x))
    assert model[0](x).ne(7).any()  # multiplied anew, since all had read


def test_siblings_are_found_by_what_they_read() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.gate, self.up = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
            self.twice = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x) + self.v(x)
            y = y + torch.cat((self.gate(y), self.up(y)), dim=-1)  # alike but for the bias
            return self.v(self.twice(self.twice(y)) * 0 + y) if self.training else self.twice(y)

    block = Block().eval()
    found = find_siblings(block, lambda: block(torch.zeros(1, 8)))
    assert found == [[block.q, block.k, block.v]]
    block.train()
    assert find_siblings(block, lambda: block(torch.zeros(1, 8))) == [[block.q, block.k]]
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_padding_adds_less_than_an_eighth_and_nothing_to_what_is_padded() -> None:
    for num_rows in range(1, 5000):
        to = packed.padded(num_rows)
        assert num_rows <= to < num_rows * 1.125
        assert packed.padded(to) == to
    assert [packed.padded(n) for n in (0, 1, 5, 9, 16, 17, 512)] == [0, 1, 5, 9, 16, 18, 512]


def test_steps_of_every_size_multiply_few_different_numbers_of_rows(
    multiplied_by_onednn: packed.PackedLinear,
) -> None:
    with counted() as seen:
        for num_rows in range(1, 513):
            run(multiplied_by_onednn, num_rows)
    assert len(seen) == 56


def test_without_padding_every_size_would_be_a_number_of_its_own(
    multiplied_by_onednn: packed.PackedLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "padded", lambda num_rows: num_rows)
    with counted() as seen:
        for num_rows in range(1, 65):
            run(multiplied_by_onednn, num_rows)
    assert len(seen) == 64
