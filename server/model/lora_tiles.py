"""How the gathered LoRA kernel is cut into programs: tiles, pipelines and warps, by shapes alone.

A row's result depends on some of it (how a sum is split) and must not on others (how many rows there are),
so what may know the number of rows takes it as an argument. Figures are for Hopper; others get the same.
"""

import math

BLOCK_ROWS = 16
"""The least that a matrix instruction takes."""
STAGES = 4
"""Tiles on their way at once."""
SHRINK_WARPS = 4
"""More than a product of 16 rows and 16 ranks has work for, as the more loads are on their way: 64 streams of
8 adapters of rank 16 take 0.02 ms less a step of 7.34 than with 2."""
_MAX_SPLITS = 16
_MAX_FEATURES = 128
"""In one tile of the input."""
_SHARE = 1024
"""Features of one program at least, as a program's first loads take as long as a tile of it."""
_MAX_COLUMNS, _MIN_COLUMNS = 256, 32
_MIN_PROGRAMS = 256
"""Tiles of outputs get narrower until there are so many: about two for each processor of an H100."""


def power_of_2_above(count: int) -> int:
    """The first that is no smaller."""
    return 1 << max(0, count - 1).bit_length()


def padded(rank: int) -> int:
    """The rank as matrix instructions take it: a power of two, 16 at least."""
    return max(16, power_of_2_above(rank))


def _power_of_2_below(largest: float) -> int:
    """The last that is no larger."""
    return 1 << int(math.log2(max(1.0, largest)))


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def turns(num_rows: int) -> int:
    """How many programs share the adapters of the same rows. One row has one."""
    return 1 if num_rows == 1 else 4 if num_rows <= BLOCK_ROWS else 2


def features(rank: int, element_size: int) -> int:
    """Features in one tile: all stages' inputs and weights stay within 96 KiB of shared memory."""
    most = (96 << 10) // STAGES // ((padded(rank) + BLOCK_ROWS) * element_size)
    return max(16, min(_MAX_FEATURES, _power_of_2_below(most)))


def splits(in_features: int, block: int) -> tuple[int, int]:
    """Features of one program, a multiple of `block`, and how many programs that makes.

    Whatever the number of rows, as a row's sum must not depend on its neighbours.
    """
    wanted = min(_MAX_SPLITS, _ceil_div(in_features, _SHARE))
    split = _ceil_div(_ceil_div(in_features, wanted), block) * block
    return split, _ceil_div(in_features, split)


def summed(rank: int, num_splits: int) -> int:
    """How many parts of a low rank are summed at once, a power of two: they are in registers."""
    return min(power_of_2_above(num_splits), max(1, 256 // padded(rank)))


def warps(rank: int, block: int) -> int:
    """For a tile of `lora_B`: few, since every one waits for the others; a thread reads up to 128 bytes."""
    return max(1, min(4, block * padded(rank) // 1024))


def columns(rank: int, element_size: int, widths: tuple[int, ...], num_others: int) -> int:
    """Columns in one tile, as many as leave enough programs; num_others: those of each tile."""
    most = _power_of_2_below((16 << 10) / (padded(rank) * element_size))
    block = max(16, min(_MAX_COLUMNS, most))
    while block > _MIN_COLUMNS:
        if num_others * sum(_ceil_div(width, block) for width in widths) >= _MIN_PROGRAMS:
            break
        block //= 2
    return block
