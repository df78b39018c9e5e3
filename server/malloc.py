"""glibc's malloc, told to keep few pools of memory, and none of what is large and seldom.

By default each thread that allocates gets a pool (an arena) of its own, eight a core, and what is freed in
one is of no use to the others. Requests, adapters and calibrations come from many threads, so that
free memory in those pools grew for as long as the server ran.

And by default the first large piece that is freed teaches it to take others of that size from the pools, too,
where small ones then settle in the gap, so that the next large one finds none: the 16 MiB of hashing a key
made a pool grow by that much again and again. With a fixed threshold such a piece comes from the system and
goes back to it. Activations of models for which a page fault counts are smaller.

Called by `serve` before threads start.
"""

import ctypes
import sys

_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
MAX_ARENAS = 2
"""The event loop's and the engine's: whoever else allocates does so seldom."""
LARGE_BYTES = 8 << 20
KEPT_BYTES = 32 << 20
"""Free memory at the end of a pool that stays, as it does by default once something large was freed; it has
to be said because a fixed threshold fixes this one at 128 KiB."""


def keep_little() -> None:
    """Does nothing where malloc is not glibc's."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, MAX_ARENAS)
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
