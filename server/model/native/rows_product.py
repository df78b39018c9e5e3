"""What a compiled product's kernels have in common: rows in, rows out."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from server.model.native.library import Library
from server.model.native.structures import DTYPES, Int8ProductCall, ProductCall
from server.model.replay.bound import Bound
from server.model.replay.tape import Value


class RowsProduct(ABC):
    """One weight's product by a kernel."""

    def __init__(self, library: Library, kernel: str, num_outputs: int, num_inputs: int) -> None:
        """kernel: one of `library.STEPS`."""
        self._library, self._kernel = library, kernel
        self.num_outputs, self.num_inputs = num_outputs, num_inputs

    def __call__(self, input: Tensor) -> Tensor:
        """input `[..., in_features]`, of a dtype that the kernel takes -> `[..., out_features]` of it."""
        output = input.new_empty(*input.shape[:-1], self.num_outputs)
        x = input.reshape(-1, self.num_inputs)
        if x.stride(1) != 1:
            x = x.contiguous()
        call = self._call(len(x), x.dtype)
        x = x.float()  # each thread would make its own
        call.x_dtype = DTYPES[x.dtype]
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        call.y = output.data_ptr()
        self._library.run(self._kernel, call, torch.get_num_threads())
        return output

    def bind(self, x: Value, y: Value) -> Bound | None:
        """`y = x W^T + bias`, y contiguous, of a product that outlives it; None where the rows of x do not
        lie evenly.
        """
        row_stride = x.row_stride
        if row_stride is None or x.dtype is not y.dtype:
            return None
        call = self._call(y.extent // self.num_outputs, x.dtype)
        call.x_stride = row_stride
        return Bound(self._kernel, call, (x, y), ((call, "x"), (call, "y")), (y,))

    @abstractmethod
    def _call(self, num_rows: int, dtype: torch.dtype) -> ProductCall | Int8ProductCall:
        """Everything but `x`, `x_stride` and `y`, whose rows lie one after the other."""
