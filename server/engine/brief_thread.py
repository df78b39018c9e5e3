"""Work on a thread that ends with it, for tensors that are touched off the engine's thread.

OpenMP keeps a pool of threads for every thread that ever ran a parallel operation, as long as it lives.
As soon as the pools of a process have more threads than the processor has cores, none of them spins
any more while it waits: the next product, a tenth of a millisecond away, has to wake a sleeping thread.
Beside a main thread that had loaded the model, an engine on two cores took 30 ms for a step of 22 ms
(16 rows of 12 layers x 768) and 21 ms for one of 12 (1 row). So whatever loads weights or looks through
them does so here, and its pool is gone when the engine runs.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def run(work: Callable[[], Result]) -> Result:
    """The work's result, or what it raised. Blocks until the thread is gone."""
    thread, future = _start(work)
    thread.join()
    return future.result()


async def run_async(work: Callable[[], Result]) -> Result:
    """The same for an event loop. Cancelled, it leaves the work to end by itself."""
    return await asyncio.wrap_future(_start(work)[1])


def _start(work: Callable[[], Result]) -> "tuple[Thread, Future[Result]]":
    future: Future[Result] = Future()

    def body() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 -- it is raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = Thread(target=body, name="fathom-brief", daemon=True)
    thread.start()
    return thread, future
