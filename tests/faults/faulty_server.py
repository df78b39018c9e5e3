"""`fathom serve` with a fault in its engine, for tests of the process that it is.

`python faulty_server.py FAULT N ARGUMENT ...`: after N of the engine's steps the fault
happens. The arguments are those of `fathom`.
"""

import sys
import time
from threading import current_thread
from typing import Any, NoReturn

from server import cli
from server.access.rate_limits import RateLimits
from server.model.runner import ModelRunner


def hang() -> NoReturn:
    while True:
        time.sleep(3600)


def lose_device() -> NoReturn:
    ModelRunner.is_device_lost = lambda _: True  # type: ignore[method-assign]
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def die() -> NoReturn:
    raise SystemExit("a bug that nothing catches")


def be_slow() -> None:
    """Lets the step go on: what takes long, and no processor."""
    time.sleep(0.02)


def count_by_the_time_of_day() -> None:
    """No fault of a step: what a minute's limits would be without a monotonic clock."""
    RateLimits.__init__.__defaults__ = (time.time,)  # type: ignore[attr-defined]


FAULTS = {"hang": hang, "lose-device": lose_device, "die": die, "slow": be_slow}
BEFORE = {"wall-clock": count_by_the_time_of_day}
"""What is wrong from the start."""


def main() -> None:
    if sys.argv[1] in BEFORE:
        BEFORE[sys.argv[1]]()
        cli.main(sys.argv[3:])
    fault, num_steps = FAULTS[sys.argv[1]], int(sys.argv[2])
    run = ModelRunner.run
    num_run = 0

    def faulty(self: ModelRunner, batch: Any) -> Any:
        nonlocal num_run
        # The self-test at the load runs elsewhere.
        num_run += current_thread().name == "fathom-engine"
        if num_run > num_steps:
            fault()
        return run(self, batch)

    ModelRunner.run = faulty  # type: ignore[method-assign]
    cli.main(sys.argv[3:])


if __name__ == "__main__":
    main()
