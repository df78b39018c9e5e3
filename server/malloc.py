"""glibc's malloc, told to keep few pools of memory, and none of what is large and seldom.

By default each thread that allocates gets a pool (an arena) of its own, eight a core, and what is freed in
one is of no use to the others. Requests, adapters and calibrations come from many threads, so that
free memory in those pools grew for as long as the server ran.

And by default the first large piece that is freed teaches it to take others of that size from the pools, too,
where small ones then settle in the gap, so that the next large one finds none: the 16 MiB of hashing a key
made a pool grow by that much again and again. With a fixed threshold such a piece comes from the system and
goes back to it. Activations of models for which a page fault counts are smaller.

While a model loads the threshold is lower: packed weights and the cache stay for good, and what is made on
the way to them is of their sizes, so that gaps in a pool were too small for what came after. Of a model of
340 MB 22 MB were free that way, and activations found no room in them.

`serve` calls `keep_little` before threads start; loading a model is `mapping`.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
MAX_ARENAS = 2
"""The event loop's and the engine's: whoever else allocates does so seldom."""
LARGE_BYTES = 8 << 20
KEPT_BYTES = 32 << 20
"""Free memory at the end of a pool that stays, as it does by default once something large was freed; it has
to be said because a fixed threshold fixes this one at 128 KiB."""
MAPPED_BYTES = 1 << 20
"""Pieces of a load that are mappings of their own; of what is smaller little is lost."""


def keep_little() -> None:
    """Does nothing where malloc is not glibc's."""
    _set({_M_ARENA_MAX: MAX_ARENAS, **_THRESHOLDS})


@contextmanager
def mapping() -> Iterator[None]:
    """While inside, what any thread allocates of `MAPPED_BYTES` or more is memory of its own.

    It ends with the thresholds of `keep_little`, in a process that did not call that, too: what they were
    malloc does not tell. Does nothing where malloc is not glibc's.
    """
    _set({_M_MMAP_THRESHOLD: MAPPED_BYTES})
    try:
        yield
    finally:
        _set(_THRESHOLDS)


_THRESHOLDS = {_M_MMAP_THRESHOLD: LARGE_BYTES, _M_TRIM_THRESHOLD: KEPT_BYTES}


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
