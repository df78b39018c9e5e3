"""How many files this process may have open: every connection is one.

Most systems start a process with a soft limit of 1,024 or 256, for the sake of programs that call
`select`, and let it raise that up to the hard limit. Called by `serve`, before it opens anything.
"""

import sys

import structlog

log = structlog.get_logger(__name__)


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to `wanted`, or as near as the hard one lets it; how many it lets."""
    if sys.platform == "win32":
        return wanted  # sockets are no files there
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:  # macOS has a lower limit of its own
        log.warning("the limit on open files stays as it is", limit=soft, error=str(error))
        return soft
    return target
