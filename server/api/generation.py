"""The engine's outputs for one HTTP request: merged, bounded in time, observed, and ended once.

One HTTP request is one engine request a prompt. However it ends (finished, failed, timed out, or
its client gone) the generator's `finally` closes every engine iterator, which aborts what still runs.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from server.api.deadline import Deadline
from server.api.exchange import Exchange
from server.api.metrics import Metrics
from server.engine.protocol import Engine
from server.engine.request import Request, RequestOutput
from server.errors import FathomError, GenerationError, RequestTimeout

if TYPE_CHECKING:  # it is imported where traces are wanted, and nowhere else
    from server.api.tracing import Tracing

IndexedOutput = tuple[int, RequestOutput]
"""The position of a prompt in its HTTP request, and what its engine request gained."""


async def generate(
    engine: Engine,
    requests: Sequence[Request],
    *,
    timeout_s: float,
    metrics: Metrics,
    exchange: Exchange,
    tracing: "Tracing | None" = None,
) -> AsyncGenerator[IndexedOutput, None]:
    """Outputs as they come, until every request has finished.

    Raises what the engine raised or reported (the whole HTTP request fails with its first failing
    prompt) and RequestTimeout once `timeout_s` have passed since the call.
    """
    observations = exchange.observations = [metrics.observe(request) for request in requests]
    parent = None if tracing is None else tracing.parent()
    cause = "disconnect"
    deadline = Deadline(asyncio.get_running_loop().time() + timeout_s)
    try:
        async with aclosing(_merge(engine, requests)) as outputs:
            while True:
                try:
                    with deadline:
                        index, output = await anext(outputs)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise RequestTimeout(
                        f"the request took longer than the limit of {timeout_s:g} s"
                    ) from None
                observations[index].output(output)
                if output.error is not None:
                    raise output.error
                if any(delta.finish_reason == "abort" for delta in output.deltas):
                    raise GenerationError("the request was aborted by the server")
                yield index, output
    except RequestTimeout:
        cause = "timeout"
        raise
    except FathomError as error:
        cause = error.code or "error"
        raise
    except Exception:
        cause = "internal_error"
        raise
    finally:
        deadline.close()
        for seen in observations:
            metrics.ended(seen, cause)
            if tracing is not None and parent is not None:
                tracing.record(seen, parent, engine.info.name)


async def _merge(
    engine: Engine, requests: Sequence[Request]
) -> AsyncGenerator[IndexedOutput, None]:
    if len(requests) == 1:
        async with aclosing(engine.generate(requests[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return

    # Bounded, so that what a slow reader leaves stays with the engine, which puts it together.
    arrived: asyncio.Queue[IndexedOutput | Exception | None] = asyncio.Queue(len(requests))

    async def pump(index: int, request: Request) -> None:
        end = None
        try:
            async with aclosing(engine.generate(request)) as outputs:
                async for output in outputs:
                    await arrived.put((index, output))
        except Exception as error:  # noqa: BLE001 -- it is raised where the outputs are read
            end = error
        await arrived.put(end)

    pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        num_running = len(pumps)
        while num_running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
