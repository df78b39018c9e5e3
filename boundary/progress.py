"""How far a piece of work has come that is done in slices, so that other work may run in between.

Such work is a generator: it yields before its first slice and after every one, and returns what it
found. Between slices it holds nothing but memory, so that closing it undoes it.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

Found = TypeVar("Found")

WAIT_S = 0.001
"""A slice that only waits: short beside a step of any model."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of one stage is done.

    stage: its name, such as `score`; a piece of work may have several, one after the other.
    done, total: in what the stage counts, scores or samples.
    num_layer_evaluations: what that took, in passes of one sample through one decoder layer.
    """

    stage: str
    done: int
    total: int
    num_layer_evaluations: int = 0


class Stopped(Exception):
    """`should_stop` said so. Nothing was kept."""


def drain(
    slices: Generator[Progress, None, Found],
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Found:
    """Do all slices, one after the other, and return what was found.

    `on_progress` is called after each slice, `should_stop` asked before each. Raises Stopped if told
    to stop.
    """
    try:
        before = next(slices)
        while True:
            if should_stop is not None and before.done < before.total and should_stop():
                what = f"{before.done} of {before.total}"
                raise Stopped(f"stopped after {what} in stage {before.stage!r}")
            before = next(slices)
            if on_progress is not None:
                on_progress(before)
    except StopIteration as end:
        found: Found = end.value
        return found
    finally:
        slices.close()


def aside(stage: str, work: Callable[[], Found]) -> Generator[Progress, None, Found]:
    """Work that needs no model, on a thread of its own; its slices wait for it, and not long.

    Closing leaves the thread to end by itself. Raises what the work raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=stage)
    try:
        future = pool.submit(work)
        yield Progress(stage, 0, 1)
        while not wait([future], WAIT_S).done:
            yield Progress(stage, 0, 1)
        yield Progress(stage, 1, 1)
        return future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
