"""Where the event loop and the engine thread meet: submit, stream, abort, and nothing else.

One thread owns the core and takes commands from a queue between steps; outputs go back to each
stream's own event loop, one wake-up a step. Every accepted request gets exactly one finished output:
also when it is aborted, when its step fails or never ends, and when the engine dies.
"""

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import structlog

from server.config import Settings
from server.engine import brief_thread
from server.engine.background import Background, Task
from server.engine.backlog import Backlog
from server.engine.core import EngineCore
from server.engine.depths import Depth
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
from server.engine.watchdog import Watchdog
from server.errors import (
    AdapterError,
    Conflict,
    DeviceLost,
    EngineDead,
    FathomError,
    QueueFull,
    QueueTimeout,
)
from server.model.loader import Progress
from server.sources.location import RemoteAdapter

log = structlog.get_logger(__name__)


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


@dataclass(frozen=True, slots=True)
class _DropUnloaded:
    pass


_Command = _Submit | _Abort | _DropUnloaded | _Begin | _Cancel | _Stop


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
        self._background = Background(
            core.runner,
            share=background_share,
            max_step_tokens=core.scheduler.max_num_batched_tokens,
        )
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._backlog = backlog or Backlog()
        self._stats = core.stats()
        self._is_alive = True
        self._is_stuck = False
        self._refusal: FathomError | None = None
        """Why no request is taken any more."""
        core.runner.before_forward = self._outbox.deliver
        self._thread = Thread(target=self._run, name="fathom-engine", daemon=True)
        self._watchdog = Watchdog(step_timeout_s, self._give_up) if step_timeout_s else None
        self._thread.start()
        if self._watchdog is not None:
            self._watchdog.start()

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
        if adapter.uid in self._stats.resident_depths:
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
        self._check_accepting()
        task = Task(make, asyncio.get_running_loop(), on_progress)
        self._commands.put(_Begin(task))
        try:
            return await asyncio.wrap_future(task.result)
        finally:
            self._commands.put(_Cancel(task))

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
            self._commands.put(_DropUnloaded())
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        self._registry.unload(name)
        self._commands.put(_DropUnloaded())

    async def check_grammar(self, grammar: str) -> None:
        """See `protocol.Engine.check_grammar`."""
        await asyncio.wrap_future(self._core.grammars.submit_check(grammar))

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `protocol.Engine.generate`."""
        self._check_accepting()
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
            self._check_accepting()  # it ended just now, and may not have seen this stream
            self._commands.put(_Submit(request))
            while not is_finished:
                output = await mailbox.get()
                is_finished = output.finished
                yield output
        finally:
            # The only way out: also when the consumer is cancelled or stops listening.
            del self._outbox.mailboxes[request.id]
            self._backlog.leave(request.id)
            if not is_finished:
                self._commands.put(_Abort(request.id))

    def end_all(self, error: FathomError) -> None:
        """See `protocol.Engine.end_all`."""
        for request_id in self._end_streams(error):
            self._commands.put(_Abort(request_id))

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Abort what is left, end the thread, take the hooks off the model. Idempotent.

        A thread that is stuck in a step is left behind.
        """
        self._commands.put(_Stop())
        if self._watchdog is not None:
            self._watchdog.stop()
        if not self._is_stuck:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        ended: list[RequestOutput] = []
        error = EngineDead("the engine has stopped")
        try:
            while self._take_commands():
                self._step()
            if not self._is_stuck:
                ended = self._core.close()
                self._stats = self._core.stats()
        except DeviceLost as lost:
            log.exception("the device is lost")
            error = lost
        except BaseException:
            # What the core holds is of no use any more; its streams still end.
            log.exception("the engine thread died")
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            self._is_alive = False
            self._outbox.deliver(ended)
            self._background.close(error)
            self._refuse_commands(error)
            # A request that was still in the queue has no output from the core.
            self._end_streams(error, but={output.request_id for output in ended})

    def _step(self) -> None:
        if self._watchdog is not None:
            self._watchdog.step_begins()
        for request_id in self._backlog.overdue():
            self._time_out(request_id)
        outputs = self._core.step()
        for sequence in self._core.scheduler.admitted:
            self._backlog.leave(sequence.request.id)
        self._stats = self._core.stats()  # first: who has an output finds it counted
        if not self._is_stuck:  # else its streams have ended long since
            has_computed = self._outbox.num_held == 0  # or what was held would have gone out
            self._outbox.hold(outputs)
            if not has_computed or not self._is_let_go_soon():
                self._outbox.deliver()
            self._background.advance(is_busy=self._core.has_work)
        if self._watchdog is not None:
            self._watchdog.step_ends()

    def _is_let_go_soon(self) -> bool:
        """Whether the next step leaves Python to others while it computes.

        Who reads outputs wants the GIL, and would get it from every operator of this thread that lets go of
        it: with 16 readers 2.4 ms of a decode step lay outside its kernels instead of 1.2.
        """
        goes_on = self._core.has_work and not self._background.has_tasks
        return goes_on and self._core.runner.lets_go_of_python

    def _give_up(self) -> None:
        """The watchdog's thread: the engine's own does not come back."""
        assert self._watchdog is not None
        self._is_stuck = True
        self._is_alive = False
        error = EngineDead(
            f"a step has taken longer than {self._watchdog.timeout_s:g} s: it is stuck"
        )
        log.error(
            "a step is stuck",
            timeout_s=self._watchdog.timeout_s,
            requests=len(self._outbox.mailboxes),
        )
        self._commands.put(_Stop())
        self._end_streams(error)

    def _end_streams(self, error: FathomError, but: Collection[str] = ()) -> list[str]:
        """Take no request any more, and end those that are here, with this error. Any thread may."""
        self._refusal = self._refusal or error
        request_ids = [
            request_id for request_id in list(self._outbox.mailboxes) if request_id not in but
        ]
        self._outbox.deliver(
            RequestOutput(request_id, finished=True, error=error) for request_id in request_ids
        )
        return request_ids

    def _check_accepting(self) -> None:
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    def _time_out(self, request_id: str) -> None:
        """End a request that has waited too long, unless it is not here yet."""
        error = QueueTimeout(
            f"the request waited longer than {self._backlog.timeout_s:g} s to be admitted"
        )
        output = self._core.abort(request_id, error)
        if output is not None:
            self._backlog.leave(request_id)
            self._outbox.deliver([output])

    def _take_commands(self) -> bool:
        """Carry out what is in the queue, waiting for it while there is nothing to run; False: stop."""
        while True:
            has_work = self._core.has_work
            if not has_work:
                self._core.runner.slots.drop_unwanted()
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
                        self._outbox.deliver([output])
                case _Submit(request):
                    self._add(request)
                case _DropUnloaded():
                    self._core.runner.slots.look_for_unwanted()
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
            self._outbox.deliver([RequestOutput(request.id, finished=True, error=error)])
        except Exception as error:
            log.exception("a request could not be added")
            wrapped = FathomError(f"the request could not be started: {error}")
            self._outbox.deliver([RequestOutput(request.id, finished=True, error=wrapped)])


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
