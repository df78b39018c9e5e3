"""Compiling a stranger's regular expression without letting it take the machine.

The `regex` package can be given a time limit for matching, but none for compiling, and it unrolls
repeat counts: `((a{999}){999}){999}`, twenty characters, takes gigabytes before anything is matched.
"""

import regex

MAX_REPEATS = 1000
"""Product of a pattern's repeat counts: each nesting multiplies the compiled size by its own."""

_COUNT = regex.compile(r"\{\s*([0-9]+)")
_VERBOSE = regex.compile(r"\(\?[a-wyz0-9-]*x[a-z0-9-]*[):]", regex.I)


def compile_bounded(pattern: str) -> regex.Pattern[str]:
    """Compile a pattern. Raises ValueError, which ends a sentence that begins with the pattern."""
    if _VERBOSE.search(pattern):  # white space could then hide a count
        raise ValueError("has the flag x, which is not accepted")
    repeats = 1
    for count in _COUNT.findall(pattern):
        repeats *= max(1, int(count))
        if repeats > MAX_REPEATS:
            raise ValueError(f"has repeat counts whose product is over {MAX_REPEATS}")
    try:
        return regex.compile(pattern, cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"is no usable pattern: {str(error)[:200]}") from None
