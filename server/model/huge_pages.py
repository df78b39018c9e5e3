"""Large pages for the memory that every step reads from end to end: weights and KV cache.

A decode step streams all of the weights, and with pages of 4 KiB the processor looks up a quarter of a
million addresses to do so. On a virtual machine of two cores of a Zen 5, where each look-up is two, products
of one row read 42 GB/s from small pages and up to 62 from large ones (torch 2.13; as much as before where
the host itself had no large pages to give). Only advice to Linux, and harmless where it is not taken.
"""

import ctypes
import re
import sys
from pathlib import Path

from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # Linux; neither is among the constants of Python 3.11's mmap
_MADV_COLLAPSE = 25  # Linux 6.1
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$")


def advise(tensor: Tensor) -> None:
    """Ask for large pages wherever the tensor's memory has not been touched yet."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr()
        _madvise(start, start + tensor.nbytes, _MADV_HUGEPAGE)


def collapse(min_bytes: int) -> int:
    """Move what this process holds in pieces of at least `min_bytes` to large pages.

    For memory that libraries allocated themselves, as oneDNN does for packed weights. Returns how many
    bytes lie in such pieces, whether or not Linux had large pages for them.
    """
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.is_file():
        return 0
    num_bytes = 0
    for line in maps.read_text().splitlines():
        found = _MAPPING.match(line)
        if found is None:
            continue
        start, end = int(found[1], 16), int(found[2], 16)
        if end - start >= min_bytes:
            _madvise(start, end, _MADV_HUGEPAGE)
            _madvise(start, end, _MADV_COLLAPSE)
            num_bytes += end - start
    return num_bytes


def _madvise(start: int, end: int, advice: int) -> None:
    """Whole large pages within the range; what Linux says to it is not asked for."""
    first = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    last = end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
