"""A chain of elementwise operators as one call of the compiled kernel.

`chain.c` says what each instruction is.
"""

import ctypes
from itertools import accumulate
from math import prod

from server.model.native.structures import DTYPES, ChainCall, ChainOp, ChainOperandEntry, Code, Kind
from server.model.replay.bound import Bound
from server.model.replay.chain import Chain
from server.model.replay.lowering import Place

_LANES = 16


class BoundChain(Bound):
    """A chain whose every vector is computed by one call."""

    counts_flat_rows = False

    def __init__(self, chain: Chain) -> None:
        self._operands = (ChainOperandEntry * len(chain.operands))()
        for entry, operand in zip(self._operands, chain.operands, strict=True):
            strides = (0,) * (4 - len(operand.strides)) + operand.strides
            entry.strides[:] = [stride * operand.value.dtype.itemsize for stride in strides]
            entry.dtype = DTYPES[operand.value.dtype]
        # A register holds whole vectors, and one more that a part of it may run into.
        sizes = [(-(-length // _LANES) + 1) * _LANES for length in chain.registers]
        starts = [0, *accumulate(sizes)]

        def at(place: Place | float | None) -> int:
            return starts[place.register] + place.start if isinstance(place, Place) else 0

        self._ops = (ChainOp * len(chain.instructions))()
        for op, instruction in zip(self._ops, chain.instructions, strict=True):
            b = instruction.b
            op.code = instruction.code
            op.out, op.a = at(instruction.out), at(instruction.a)
            op.b = at(b) if instruction.operand is None else instruction.operand
            # A mean and a store are as long as what they read.
            is_made = instruction.out is not None and instruction.code is not Code.MEAN
            measured = instruction.out if is_made else instruction.a
            assert measured is not None
            op.length = measured.length
            if isinstance(b, Place):
                op.kind = Kind.VECTOR if b.length == op.length else Kind.FIRST
            elif b is not None:
                op.kind, op.value = Kind.CONSTANT, b
        outer = (1,) * (4 - len(chain.outer)) + chain.outer
        call = ChainCall(
            operands=ctypes.addressof(self._operands),
            ops=ctypes.addressof(self._ops),
            num_ops=len(self._ops),
            sizes=(ctypes.c_int64 * 4)(*outer),
            num_vectors=prod(outer),
            num_floats=starts[-1],
            num_computed=chain.num_computed,
        )
        operands = [operand.value for operand in chain.operands]
        fields = [(entry, "address") for entry in self._operands]
        parts = (*self._operands, *self._ops)
        super().__init__("fathom_chain", call, operands, fields, chain.stores, parts)
