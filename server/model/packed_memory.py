"""Memory of weights that were packed or quantized, given back to the system."""

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_PAGEOUT = 21  # Linux 5.4; not among the constants of Python 3.11's mmap


def page_out(weight: Tensor) -> None:
    """Let go of a plain weight's pages, which nobody reads again.

    transformers maps a checkpoint rather than reading it, and one tensor that lives on (an
    embedding, a norm) keeps the whole file mapped: without this the weights count twice in resident
    memory. Only advice: pages that are still needed come back from the file.
    """
    if sys.platform != "linux" or weight.device.type != "cpu":
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)
