"""glibc's malloc, told to keep few pools of memory.

By default each thread that allocates gets a pool (an arena) of its own, eight a core, and what is freed in
one is of no use to the others. Requests, adapters and calibrations come from many threads, so that
free memory in those pools grew for as long as the server ran. Called by `serve` before threads start.
"""

import ctypes
import sys

_M_ARENA_MAX = -8
MAX_ARENAS = 2
"""The event loop's and the engine's: whoever else allocates does so seldom."""


def keep_few_arenas() -> None:
    """Does nothing where malloc is not glibc's."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, MAX_ARENAS)
