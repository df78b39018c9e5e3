"""What a compiled product's kernels have in common: rows in, rows out, one call bound to where they go."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor


class RowsProduct(ABC):
    """One weight's product by a kernel."""

    def __init__(self, kernel: Callable[[int], object], num_outputs: int, num_inputs: int) -> None:
        """kernel: takes the address of a call."""
        self._kernel = kernel
        self.num_outputs, self.num_inputs = num_outputs, num_inputs

    def __call__(self, input: Tensor) -> Tensor:
        """input `[..., in_features]`, of a dtype that the kernel takes -> `[..., out_features]` of it."""
        output = input.new_empty(*input.shape[:-1], self.num_outputs)
        self.bound(output)(input)
        return output

    def bound(self, output: Tensor) -> Callable[[Tensor], None]:
        """What multiplies into `output`, contiguous, as many rows of its dtype as that has."""
        call = self._call(output)
        kernel, reference, num_inputs = self._kernel, ctypes.addressof(call), self.num_inputs

        def multiply(input: Tensor) -> None:
            assert input.dtype is output.dtype
            x = input.reshape(-1, num_inputs)
            if x.stride(1) != 1:
                x = x.contiguous()
            call.x, call.x_stride = x.data_ptr(), x.stride(0)
            kernel(reference)

        return multiply

    @abstractmethod
    def _call(self, output: Tensor) -> ctypes.Structure:
        """Everything but `x` and `x_stride`."""
