"""A client of an engine in this process: no HTTP, no serialization, the engine's own thread."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count

from server.bench.load import Counters, Piece, RequestFailed
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from server.engine.async_engine import AsyncEngine
from server.engine.request import LoraSelection, Request, SamplingParams
from server.errors import FathomError


class EngineClient:
    """`load.Client` over an `AsyncEngine`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._ids = count()

    async def select(self, choice: Choice) -> LoraSelection:
        """The engine's own answer to a choice. Raises NotFound or BadRequest."""
        if choice.adapter is None:
            return await self.engine.select(self.engine.info.name, None)
        return await self.engine.select(
            choice.adapter, "full" if choice.depth is None else choice.depth
        )

    async def request(self, item: WorkItem, logprobs: int | None = None) -> Request:
        """An item as the engine takes it: greedy, and as long as it was asked to be."""
        sampling = SamplingParams(
            max_tokens=item.output_len, temperature=0.0, ignore_eos=True, logprobs=logprobs
        )
        selection = await self.select(item.choice)
        return Request(f"bench-{next(self._ids)}", item.prompt, sampling, selection)

    async def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        """See `load.Client.stream`."""
        try:
            request = await self.request(item)
            async for output in self.engine.generate(request):
                if output.error is not None:
                    raise RequestFailed(output.error.message)
                yield Piece(
                    num_tokens=sum(len(delta.token_ids) for delta in output.deltas),
                    num_output_tokens=output.num_output_tokens,
                    num_cached_tokens=output.num_cached_tokens,
                )
        except FathomError as error:
            raise RequestFailed(error.message) from error

    async def counters(self) -> Counters:
        """See `load.Client.counters`."""
        # The engine publishes its counters after it has delivered a step's outputs.
        while self.engine.is_alive and self.engine.stats().num_running:
            await asyncio.sleep(0.001)
        stats = self.engine.stats()
        return Counters(
            num_steps=stats.num_steps,
            num_preemptions=stats.num_preemptions,
            num_recomputed_tokens=stats.num_recomputed_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            layers_applied=stats.layers.applied,
            layers_skipped=stats.layers.skipped,
        )
