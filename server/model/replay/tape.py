"""What one forward pass calls, operator by operator: which values each reads, and where they lie.

A value is memory that one call made (or that was there before) together with the sizes and strides under
which it is looked at, so views are no calls. Nothing of the pass's Python is kept, and all that it chose is
what it was: a pass whose Python looks at a number of a tensor, or whose operators choose by one or draw one,
cannot be replayed and raises NotReplayable while it is noted.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from server.model.replay.trees import leaves, mapped

_LOOKS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.item,
    torch.ops.aten.equal,
}
"""Operators that give Python a number of a tensor."""


class NotReplayable(Exception):
    """Why a pass can only be run, not replayed."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the pass: a view of the memory `root`."""

    root: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements, from the start of the memory."""
    dtype: torch.dtype

    @property
    def extent(self) -> int:
        """Elements from its first to its last, with both."""
        pairs = zip(self.size, self.stride, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in pairs)

    @property
    def row_stride(self) -> int | None:
        """Elements from each vector of the last dimension to the next, in their order; None where these
        do not lie evenly, or a vector's own elements not side by side.
        """
        if not self.size or (self.stride[-1] != 1 and self.size[-1] != 1):
            return None
        found, expected = None, 0
        for size, stride in zip(self.size[-2::-1], self.stride[-2::-1], strict=True):
            if size == 1:
                continue
            if found is None:
                found = stride
            elif stride != expected:
                return None
            expected = size * stride
        return self.size[-1] if found is None else found


@dataclass(frozen=True, slots=True)
class Call:
    """One operator, or one call of Python's (`paged attention`) that is made again each time.

    args and kwargs: as they were given, with a Value in place of each tensor.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    """Every value among them."""
    outputs: tuple[Value | None, ...]
    """In the order of the result's leaves; None for one that is no tensor."""


@dataclass
class _Memory:
    tensor: Tensor
    """Keeps the memory, so that its address means it alone while the pass is noted."""
    root: int


@dataclass
class Tape:
    """The calls of a pass, in their order."""

    calls: list[Call] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)
    """Memory that the pass found: by root, the tensor that was seen of it first."""


class CallNoter(Protocol):
    """Whoever wants to know of calls that torch's dispatcher does not see."""

    def call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Make the call."""


@runtime_checkable
class Outlined(Protocol):
    """A function whose result can be had without what takes time."""

    def outline(self, *args: Any) -> Tensor:
        """Zeros, laid out as what the call gives."""


_writing: ContextVar[CallNoter | None] = ContextVar("fathom_tape", default=None)


def noted_call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, one call of the tape where a pass is being noted, whatever it does inside."""
    noter = _writing.get()
    return function(*args) if noter is None else noter.call(function, *args)


@contextmanager
def noting(noter: CallNoter) -> Iterator[None]:
    """Tell `noter` of such calls while the block lasts."""
    token = _writing.set(noter)
    try:
        yield
    finally:
        _writing.reset(token)


class TapeWriter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is called while it is entered."""

    def __init__(self, *, is_outline: bool = False) -> None:
        """is_outline: of what can be an `Outlined`, for the shape of the pass at little cost."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self._is_outline = is_outline
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self._memories: dict[int, _Memory] = {}
        self._is_paused = False
        self._noting = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks when the class is made: to skip its compiler, the first operator would import it."""
        return False

    def __enter__(self) -> Self:
        self._noting.enter_context(noting(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._noting.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        given = kwargs or {}
        if self._is_paused:
            return func(*args, **given)
        if func.overloadpacket in _LOOKS or _chooses(func, args):
            raise NotReplayable(f"{func} looks at a tensor's numbers")
        noted_args, noted_kwargs = mapped(self._noted, (args, given))
        result = func(*args, **given)
        made = tuple(leaves(result))
        inputs = {id(leaf) for leaf in leaves((args, given))}
        is_view = not func._schema.is_mutable and all(
            id(leaf) in inputs or self._is_known(leaf) for leaf in made if isinstance(leaf, Tensor)
        )
        if not is_view and torch.Tag.nondeterministic_seeded in func.tags:
            raise NotReplayable(f"{func} draws numbers")
        outputs = tuple(self._value(x) if isinstance(x, Tensor) else None for x in made)
        if not is_view:
            self.tape.calls.append(
                Call(
                    func, noted_args, noted_kwargs, _values_in((noted_args, noted_kwargs)), outputs
                )
            )
        return result

    def call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Make a call that is to be made again as it is, whatever it does inside."""
        noted = mapped(self._noted, args)
        make = function
        if self._is_outline and isinstance(function, Outlined):
            make = function.outline
        with self._paused():
            result = make(*args)
        self.tape.calls.append(Call(function, noted, {}, _values_in(noted), (self._value(result),)))
        return result

    def value_of(self, tensor: Tensor) -> Value:
        """Of a tensor of the pass, or one that was there before."""
        noted: Value = self._noted(tensor)
        return noted

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _noted(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        is_new = not self._is_known(leaf)
        value = self._value(leaf)
        if is_new:
            self.tape.given[value.root] = leaf
        return value

    def _is_known(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values or _address(tensor) in self._memories

    def _value(self, tensor: Tensor) -> Value:
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        memory = self._memories.get(_address(tensor))
        if memory is None:
            memory = _Memory(tensor, len(self._memories))
            self._memories[_address(tensor)] = memory
        if tensor.layout is torch.strided:
            stride, offset = tensor.stride(), int(tensor.storage_offset())
        else:  # packed weights, which are read whole
            stride, offset = (), 0
        value = Value(memory.root, tuple(tensor.shape), stride, offset, tensor.dtype)
        self._values[id(tensor)] = (tensor, value)
        return value


def _values_in(tree: Any) -> tuple[Value, ...]:
    return tuple(leaf for leaf in leaves(tree) if isinstance(leaf, Value))


def _chooses(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether how large the output is depends on numbers."""
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return any(
        tag in func.tags
        for tag in (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    )


def _address(tensor: Tensor) -> int:
    """Which memory a tensor is a view of."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata or id(tensor)
