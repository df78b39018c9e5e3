"""Where the event loop and the engine's thread meet: submit, stream, abort, and nothing else.

What is asked goes to the thread as a command; outputs come back to each stream's own event loop, one
wake-up a step.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from server.config import Settings
from server.engine import brief_thread
from server.engine.arrivals import Arrivals
from server.engine.background import Task
from server.engine.backlog import Backlog
from server.engine.commands import Abort, Begin, Cancel, DropUnloaded, Submit
from server.engine.core import EngineCore
from server.engine.depths import Depth
from server.engine.engine_thread import EngineThread
from server.engine.mailbox import Mailbox
from server.engine.outbox import Outbox
from server.engine.protocol import (
    AdapterCounts,
    EngineStats,
    LayerCount,
    MakeSlices,
    Residency,
    StepCounts,
)
from server.engine.request import (
    AdapterRef,
    CalibratedDepth,
    LoraSelection,
    Request,
    RequestOutput,
)
from server.errors import (
    AdapterError,
    Conflict,
    FathomError,
    QueueFull,
)
from server.model.loader import Progress
from server.sources.location import RemoteAdapter


class AsyncEngine:
    """The real `protocol.Engine`."""

    def __init__(
        self,
        core: EngineCore,
        *,
        max_live_requests: int,
        background_share: float = 0.1,
        backlog: Backlog | None = None,
        step_timeout_s: float | None = None,
    ) -> None:
        """backlog: bounds what waits. step_timeout_s: how long a step may take before it is stuck."""
        self.info = core.info
        self.tokenizer = core.tokenizer
        self._core = core
        self._registry = core.registry
        self._max_live_requests = max_live_requests
        self._outbox = Outbox()
        self._backlog = backlog or Backlog()
        # Elsewhere a step begins in less time than arrivals are waited for.
        self._gathers = core.runner.model.device.type == "cpu"
        self._arrivals: WeakKeyDictionary[asyncio.AbstractEventLoop, Arrivals] = WeakKeyDictionary()
        self._thread = EngineThread(
            core,
            self._outbox,
            self._backlog,
            background_share=background_share,
            step_timeout_s=step_timeout_s,
        )
        self._thread.start()

    @classmethod
    def from_settings(cls, settings: Settings, progress: Progress | None = None) -> "AsyncEngine":
        """Load the model and the named adapters, then start. Raises ModelError or AdapterError."""
        return cls(
            brief_thread.run(lambda: _load(settings, progress)),
            max_live_requests=settings.max_num_seqs + settings.max_num_waiting,
            background_share=settings.calibration_share,
            backlog=Backlog(settings.max_waiting_tokens, settings.queue_timeout_s),
            step_timeout_s=settings.step_timeout_s,
        )

    @property
    def is_alive(self) -> bool:
        """False once the engine thread has ended, or does not come back from a step."""
        return self._thread.is_serving

    def stats(self) -> EngineStats:
        """Counters as of the last step; never blocks."""
        return self._thread.stats

    def adapters(self) -> list[AdapterRef]:
        """See `protocol.Engine.adapters`."""
        return self._registry.known()

    def adapter(self, name: str) -> AdapterRef | None:
        """See `protocol.Engine.adapter`."""
        return self._registry.known_as(name)

    def layer_counts(self) -> Mapping[str, LayerCount]:
        """See `protocol.Engine.layer_counts`."""
        return self._core.tally.layers_by_adapter()

    def step_counts(self) -> StepCounts:
        """See `protocol.Engine.step_counts`."""
        return self._core.tally.steps

    def adapter_counts(self) -> AdapterCounts:
        """See `protocol.Engine.adapter_counts`."""
        return AdapterCounts(
            self._core.device_count(), self._registry.host_count(), self._registry.num_known
        )

    def residency(self, adapter: AdapterRef) -> Residency:
        """See `protocol.Engine.residency`."""
        if adapter.uid in self._thread.stats.resident_depths:
            return "device"
        return "host" if self._registry.is_loaded(adapter) else "disk"

    def calibrated_depth(self, adapter: AdapterRef) -> CalibratedDepth | None:
        """See `protocol.Engine.calibrated_depth`."""
        return self._registry.depths.calibrated(adapter)

    def set_calibrated_depths(self, depths: Mapping[str, CalibratedDepth | None]) -> None:
        """See `protocol.Engine.set_calibrated_depths`."""
        self._registry.depths.set_calibrated(depths)

    async def resolve(self, name: str) -> AdapterRef:
        """See `protocol.Engine.resolve`."""
        adapter = self._registry.find(name)
        if adapter is None:
            adapter = await brief_thread.run_async(lambda: self._registry.fetch(name))
        return adapter

    async def run_slices(self, make: MakeSlices, on_progress: Callable[[Any], None]) -> Any:
        """See `protocol.Engine.run_slices`."""
        self._thread.check_accepting()
        task = Task(make, asyncio.get_running_loop(), on_progress)
        self._thread.commands.put(Begin(task))
        try:
            return await asyncio.wrap_future(task.result)
        finally:
            self._thread.commands.put(Cancel(task))

    async def select(self, model: str, depth: Depth | None) -> LoraSelection:
        """See `protocol.Engine.select`."""
        if model == self.info.name:
            return self._registry.depths.resolve(None, depth)
        return self._registry.depths.resolve(await self.resolve(model), depth)

    async def load_adapter(
        self, name: str, path: Path | RemoteAdapter, *, replace: bool = False
    ) -> AdapterRef:
        """See `protocol.Engine.load_adapter`."""
        adapter = await brief_thread.run_async(
            lambda: self._registry.load_confined(name, path, replace=replace)
        )
        if replace:
            self._thread.commands.put(DropUnloaded())
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        self._registry.unload(name)
        self._thread.commands.put(DropUnloaded())

    async def check_grammar(self, grammar: str) -> None:
        """See `protocol.Engine.check_grammar`."""
        await asyncio.wrap_future(self._core.grammars.submit_check(grammar))

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `protocol.Engine.generate`."""
        self._thread.check_accepting()
        if request.id in self._outbox.mailboxes:
            raise Conflict(f"request id {request.id!r} is in use")
        if len(self._outbox.mailboxes) >= self._max_live_requests:
            raise QueueFull(
                f"{len(self._outbox.mailboxes)} requests are running or waiting, which is the limit"
            )
        self._backlog.enter(request)
        mailbox = self._outbox.mailboxes[request.id] = Mailbox(asyncio.get_running_loop())
        is_finished = False
        try:
            await self._arrive(mailbox.loop)
            self._thread.check_accepting()  # it ended just now, and may not have seen this stream
            self._thread.commands.put(Submit(request))
            while not is_finished:
                output = await mailbox.get()
                is_finished = output.finished
                yield output
        finally:
            # The only way out: also when the consumer is cancelled or stops listening.
            del self._outbox.mailboxes[request.id]
            self._backlog.leave(request.id)
            if not is_finished:
                self._thread.commands.put(Abort(request.id))

    async def _arrive(self, loop: asyncio.AbstractEventLoop) -> None:
        stats = self._thread.stats
        if self._gathers and not stats.num_running and not stats.num_waiting:
            await self._arrivals.setdefault(loop, Arrivals()).together()

    def end_all(self, error: FathomError) -> None:
        """See `protocol.Engine.end_all`."""
        for request_id in self._thread.end_streams(error):
            self._thread.commands.put(Abort(request_id))

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Abort what is left, end the thread, take the hooks off the model. Idempotent.

        A thread that is stuck in a step is left behind.
        """
        self._thread.stop(timeout_s)


def _load(settings: Settings, progress: Progress | None) -> EngineCore:
    core = EngineCore.from_settings(settings, progress)
    for done, (name, path) in enumerate(settings.adapter.items()):
        if progress is not None:
            progress("adapters", done, len(settings.adapter))
        # What does not fit host memory would be dropped at once, and read again for its first request.
        is_kept = done < settings.max_cpu_loras
        add = core.registry.load if is_kept else core.registry.register
        try:
            add(name, path)
        except FathomError as error:
            raise AdapterError(f"adapter {name!r} at {path}: {error.message}") from error
    if progress is not None and settings.adapter:
        progress("adapters", len(settings.adapter), len(settings.adapter))
    return core
