"""Where the event loop and the engine thread meet: submit, stream, abort, and nothing else.

One thread owns the core and takes commands from a queue between steps; outputs go back to each
stream's own event loop, one wake-up a step. Every accepted request gets exactly one finished output:
also when it is aborted, when its step fails, and when the engine dies.
"""

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import structlog

from server.config import Settings
from server.engine import brief_thread
from server.engine.background import Background, Task
from server.engine.core import EngineCore
from server.engine.protocol import EngineStats, LayerCount, MakeSlices, Residency
from server.engine.registry import Depth
from server.engine.request import (
    AdapterRef,
    CalibratedDepth,
    LoraSelection,
    Request,
    RequestOutput,
)
from server.errors import AdapterError, Conflict, EngineDead, FathomError, QueueFull
from server.model.loader import Progress

log = structlog.get_logger(__name__)

_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class _Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Begin:
    task: Task


@dataclass(frozen=True, slots=True)
class _Cancel:
    task: Task


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Submit | _Abort | _Begin | _Cancel | _Stop


@dataclass(frozen=True, slots=True)
class _Stream:
    loop: asyncio.AbstractEventLoop
    outputs: "asyncio.Queue[RequestOutput]" = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """The real `protocol.Engine`."""

    def __init__(
        self, core: EngineCore, *, max_live_requests: int, background_share: float = 0.1
    ) -> None:
        self.info = core.info
        self.tokenizer = core.tokenizer
        self._core = core
        self._registry = core.registry
        self._max_live_requests = max_live_requests
        self._background = Background(
            core.runner,
            share=background_share,
            max_step_tokens=core.scheduler.max_num_batched_tokens,
        )
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._stats = core.stats()
        self._is_alive = True
        self._thread = Thread(target=self._run, name="fathom-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_settings(cls, settings: Settings, progress: Progress | None = None) -> "AsyncEngine":
        """Load the model and the named adapters, then start. Raises ModelError or AdapterError."""
        return cls(
            brief_thread.run(lambda: _load(settings, progress)),
            max_live_requests=settings.max_num_seqs + settings.max_num_waiting,
            background_share=settings.calibration_share,
        )

    @property
    def is_alive(self) -> bool:
        """False once the engine thread has ended."""
        return self._is_alive

    def stats(self) -> EngineStats:
        """Counters as of the last step; never blocks."""
        return self._stats

    def adapters(self) -> list[AdapterRef]:
        """See `protocol.Engine.adapters`."""
        return self._registry.known()

    def adapter(self, name: str) -> AdapterRef | None:
        """See `protocol.Engine.adapter`."""
        return self._registry.known_as(name)

    def layer_counts(self) -> Mapping[str, LayerCount]:
        """See `protocol.Engine.layer_counts`."""
        return self._core.layer_counts()

    def residency(self, adapter: AdapterRef) -> Residency:
        """See `protocol.Engine.residency`."""
        if adapter.uid in self._stats.resident_depths:
            return "device"
        return "host" if self._registry.is_loaded(adapter) else "disk"

    def calibrated_depth(self, adapter: AdapterRef) -> CalibratedDepth | None:
        """See `protocol.Engine.calibrated_depth`."""
        return self._registry.calibrated_depth(adapter)

    def set_calibrated_depths(self, depths: Mapping[str, CalibratedDepth | None]) -> None:
        """See `protocol.Engine.set_calibrated_depths`."""
        self._registry.set_calibrated_depths(depths)

    async def resolve(self, name: str) -> AdapterRef:
        """See `protocol.Engine.resolve`."""
        adapter = self._registry.find(name)
        if adapter is None:
            adapter = await brief_thread.run_async(lambda: self._registry.fetch(name))
        return adapter

    async def run_slices(self, make: MakeSlices, on_progress: Callable[[Any], None]) -> Any:
        """See `protocol.Engine.run_slices`."""
        if not self._is_alive:
            raise EngineDead("the engine has stopped")
        task = Task(make, asyncio.get_running_loop(), on_progress)
        self._commands.put(_Begin(task))
        try:
            return await asyncio.wrap_future(task.result)
        finally:
            self._commands.put(_Cancel(task))

    async def select(self, model: str, depth: Depth | None) -> LoraSelection:
        """See `protocol.Engine.select`."""
        if model == self.info.name:
            return self._registry.resolve(None, depth)
        return self._registry.resolve(await self.resolve(model), depth)

    async def load_adapter(self, name: str, path: Path, *, replace: bool = False) -> AdapterRef:
        """See `protocol.Engine.load_adapter`."""
        return await brief_thread.run_async(
            lambda: self._registry.load_confined(name, path, replace=replace)
        )

    async def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        self._registry.unload(name)

    async def check_grammar(self, grammar: str) -> None:
        """See `protocol.Engine.check_grammar`."""
        await asyncio.wrap_future(self._core.grammars.submit_check(grammar))

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `protocol.Engine.generate`."""
        if not self._is_alive:
            raise EngineDead("the engine has stopped")
        if request.id in self._streams:
            raise Conflict(f"request id {request.id!r} is in use")
        if len(self._streams) >= self._max_live_requests:
            raise QueueFull(
                f"{len(self._streams)} requests are running or waiting, which is the limit",
                retry_after_s=_RETRY_AFTER_S,
            )
        stream = _Stream(asyncio.get_running_loop())
        self._streams[request.id] = stream
        is_finished = False
        try:
            if not self._is_alive:  # it ended just now, and may not have seen this stream
                raise EngineDead("the engine has stopped")
            self._commands.put(_Submit(request))
            while not is_finished:
                output = await stream.outputs.get()
                is_finished = output.finished
                yield output
        finally:
            # The only way out: also when the consumer is cancelled or stops listening.
            del self._streams[request.id]
            if not is_finished:
                self._commands.put(_Abort(request.id))

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Abort what is left, end the thread, take the hooks off the model. Idempotent."""
        self._commands.put(_Stop())
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ended: list[RequestOutput] = []
        try:
            while self._take_commands():
                outputs = self._core.step()
                self._stats = self._core.stats()  # first: who has an output finds it counted
                self._deliver(outputs)
                self._background.advance(is_busy=self._core.has_work)
            ended = self._core.close()
            self._stats = self._core.stats()
        except BaseException:
            # What the core holds is of no use any more; its streams still end.
            log.exception("the engine thread died")
        finally:
            self._is_alive = False
            self._deliver(ended)
            # A request that was still in the queue has no output from the core.
            error = EngineDead("the engine has stopped")
            self._background.close(error)
            self._refuse_commands(error)
            told = {output.request_id for output in ended}
            self._deliver(
                RequestOutput(request_id, finished=True, error=error)
                for request_id in list(self._streams)
                if request_id not in told
            )

    def _take_commands(self) -> bool:
        """Carry out what is in the queue, waiting for it while there is nothing to run; False: stop."""
        while True:
            has_work = self._core.has_work
            if not has_work:
                self._stats = self._core.stats()  # aborts may have changed them since the last step
            try:
                command = self._commands.get(block=not has_work and not self._background.has_tasks)
            except queue.Empty:
                return True
            match command:
                case _Stop():
                    return False
                case _Abort(request_id):
                    output = self._core.abort(request_id)
                    if output is not None:
                        self._deliver([output])
                case _Submit(request):
                    self._add(request)
                case _Begin(task):
                    self._background.add(task)
                case _Cancel(task):
                    self._background.cancel(task)

    def _refuse_commands(self, error: EngineDead) -> None:
        """Whoever began background work too late to be seen must not wait for it for ever."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Begin) and command.task.result.set_running_or_notify_cancel():
                command.task.result.set_exception(error)

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except FathomError as error:
            self._deliver([RequestOutput(request.id, finished=True, error=error)])
        except Exception as error:
            log.exception("a request could not be added")
            wrapped = FathomError(f"the request could not be started: {error}")
            self._deliver([RequestOutput(request.id, finished=True, error=wrapped)])

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else its consumer has gone
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:
                log.warning("an event loop closed before its streams ended", streams=len(pairs))


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


def _put_all(pairs: list[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in pairs:
        stream.outputs.put_nowait(output)
