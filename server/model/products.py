"""Linears as columns of products: what several read is multiplied once, and each returns its own columns.

Query, key and value projections read one tensor, gate and up projections another: one product of their
weights laid together is a larger, so a faster one, and one launch instead of three. Here is what the
modules need of it, and the plain kind (`share`, for a CUDA device); `packed` has a CPU's. A module keeps
its identity, its name, its hooks, and a `weight` that reads as it was.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.model import context, faults
from server.model.native.rows_product import RowsProduct
from server.model.replay.bound import Bound
from server.model.replay.tape import Call, noted_call


class LinearProduct(ABC):
    """`x W^T + bias` for one Linear or several that read the same `x`."""

    def __init__(self, out_features: int, bias: Tensor | None, num_readers: int) -> None:
        """out_features, bias `[out_features]`: of all readers together."""
        self.out_features = out_features
        self.bias = bias
        self.is_shared = num_readers > 1
        self._num_readers = num_readers
        self._num_left = 0
        self.adapted_from: int | None = None
        """The readers from this one on find their columns of the last output with LoRA in them."""
        self.adapted: Tensor | None = None
        """`[num_rows, out_features]`: the last output with LoRA in it, where that is another tensor."""
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def of(self, input: Tensor) -> Tensor:
        """input `[..., in_features]` -> `[..., out_features]`.

        The readers of one step ask with the same object, and the last of them lets go of it.
        """
        if input is self._input and self._output is not None:
            output = self._output
            self._num_left -= 1
        else:
            output = self.multiply(input)
            self.adapted_from = self.adapted = None
            self._num_left = self._num_readers - 1
        is_wanted = self._num_left > 0
        self._input, self._output = (input, output) if is_wanted else (None, None)
        return output

    @abstractmethod
    def multiply(self, input: Tensor) -> Tensor:
        """What `of` gives, computed anew, contiguous."""

    @abstractmethod
    def weight(self, first_column: int, num_columns: int) -> Tensor:
        """`[num_columns, in_features]`: the rows of W that make these columns."""


class NotedProduct(LinearProduct):
    """One call of a tape, whoever multiplies; `bound.Bindable`, which a kernel's is."""

    _native: RowsProduct | None

    def multiply(self, input: Tensor) -> Tensor:
        """See `LinearProduct.multiply`."""
        step = context.find()
        if step is None or step.wanted is None:
            return noted_call(self, input)
        return step.wanted.multiply(partial(noted_call, self), input)

    @abstractmethod
    def __call__(self, input: Tensor) -> Tensor:
        """What `multiply` gives."""

    def outline(self, input: Tensor) -> Tensor:
        """See `Outlined.outline`."""
        return input.new_zeros(*input.shape[:-1], self.out_features)

    def bind(self, call: Call) -> Bound | None:
        """See `Bindable.bind`."""
        (x,), (y,) = call.inputs, call.outputs
        assert y is not None
        return None if self._native is None else self._native.bind(x, y)


class DenseProduct(LinearProduct):
    """With the weights of all readers in one tensor, by whatever torch has for the device."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_readers: int) -> None:
        """weight `[out_features, in_features]`."""
        super().__init__(len(weight), bias, num_readers)
        self._weight = weight

    def multiply(self, input: Tensor) -> Tensor:
        """See `LinearProduct.multiply`."""
        return functional.linear(input, self._weight, self.bias)

    def weight(self, first_column: int, num_columns: int) -> Tensor:
        """See `LinearProduct.weight`; a view."""
        return self._weight[first_column : first_column + num_columns]


class ProductLinear(nn.Linear):
    """What a Linear became that is part of a product, in place; made only by `join`."""

    product: LinearProduct
    first_column: int
    """Of its own in the product."""

    def forward(self, input: Tensor) -> Tensor:
        """input `[..., in_features]` -> `[..., out_features]`, in the weight's dtype."""
        output = self.product.of(input)
        if not self.product.is_shared:
            return output
        return output[..., self.first_column : self.first_column + self.out_features]

    def whole(self, columns: Tensor) -> Tensor:
        """The product's output `[num_rows, product.out_features]` around its own columns.

        columns: what `forward` returned, as `[num_rows, out_features]`.
        """
        return columns.as_strided(
            (len(columns), self.product.out_features),
            (columns.stride(0), 1),
            int(columns.storage_offset()) - self.first_column,
        )


def _weight(self: ProductLinear) -> Tensor:
    return self.product.weight(self.first_column, self.out_features)


# A property, so that readers of the weight (DoRA's row norms) still find it. Set here because nn.Linear
# declares `weight` as a parameter.
ProductLinear.weight = property(_weight)  # type: ignore[assignment]


def shared_product(module: nn.Module) -> LinearProduct | None:
    """What a module's output is part of, if other modules read the same input."""
    if isinstance(module, ProductLinear) and module.product.is_shared:
        return module.product
    return None


def num_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id: more than one where weights are tied."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


def joined(group: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a group's product, in a copy unless it is one Linear alone."""
    weights = [module.weight.detach() for module in group]
    biases = [module.bias.detach() for module in group if module.bias is not None]
    weight = weights[0] if len(group) == 1 else torch.cat(weights)
    return weight, torch.cat(biases) if biases else None


def join(
    group: Sequence[nn.Linear], product: LinearProduct, kind: type[ProductLinear] = ProductLinear
) -> None:
    """Make a group's members readers of their product, in order, and let go of their own weights."""
    start = 0
    for module in group:
        del module._parameters["weight"]
        module.__class__ = kind
        assert isinstance(module, ProductLinear)
        module.product = product
        module.first_column = start
        start += module.out_features


@torch.inference_mode()
def share(model: nn.Module, siblings: Sequence[Sequence[nn.Linear]]) -> int:
    """Make each group of `siblings` (see `find_siblings`) one dense product; returns how many did.

    Members with a tied or a quantized weight stay as they are, and so does who is left alone then. While a
    group is copied its weights are there twice, of one group at a time.
    """
    owners = num_owners(model)
    num_shared = 0
    for members in siblings:
        group = [m for m in members if _is_plain(m) and owners[id(m.weight)] == 1]
        if len(group) < 2 or len({(m.weight.dtype, m.weight.device) for m in group}) > 1:
            continue
        weight, bias = joined(group)
        join(group, DenseProduct(weight, bias, num_readers=len(group)))
        faults.free_memory(weight.device)  # or the next group finds room of the wrong sizes
        num_shared += 1
    return num_shared


def _is_plain(module: nn.Linear) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter
