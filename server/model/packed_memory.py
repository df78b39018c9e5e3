"""Memory of weights that were packed or quantized, given back to the system."""

import ctypes
import mmap
import sys

from torch import Tensor


def trim() -> None:
    """Give back what malloc keeps free between pieces in use, which the next piece may be too large for.

    What is made of a weight on the way to int8 is as large as the weight, and what stays lies in the gap
    that it leaves: 330 MB were free and of no use after 340 MB of float32. Does nothing where malloc is
    not glibc's.
    """
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


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
