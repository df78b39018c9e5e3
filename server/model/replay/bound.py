"""Steps that need no Python: a kernel's call, filled but for where its operands lie.

`team.c` runs them in a row; what differs from run to run beside the operands is in `struct pass`.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from server.model.replay.tape import Call, Value


class Bound:
    """One call of a kernel."""

    counts_flat_rows = True
    """Whether the kernel counts rows in their order in memory, whatever dimensions they lie in."""

    def __init__(
        self,
        kernel: str,
        call: ctypes.Structure,
        operands: Sequence[Value],
        fields: Sequence[tuple[ctypes.Structure, str]],
        stores: Sequence[Value],
        parts: Sequence[ctypes.Structure] = (),
    ) -> None:
        """kernel: one of `library.STEPS`, and its call. operands: the memory that it reads, writes or
        changes. fields: where the call has each one's address. stores: those of them that are made here,
        wherever it is told. parts: what the call points to of its own.
        """
        self.kernel, self.call = kernel, call
        self.operands, self.stores = operands, stores
        self.parts = (call, *parts)
        self._fields = fields

    @property
    def inputs(self) -> list[Value]:
        """Every operand that was there before."""
        stored = {value.root for value in self.stores}
        return [value for value in self.operands if value.root not in stored]

    def place(self, index: int, start: int) -> None:
        """Operand `index` begins at this address."""
        structure, name = self._fields[index]
        setattr(structure, name, start)


@runtime_checkable
class Bindable(Protocol):
    """A function of a tape that a kernel can do."""

    def bind(self, call: Call) -> Bound | None:
        """A call of it; None where its values do not lie as the kernel reads them."""
