"""The engine's thread: it owns the core, and between steps does what it is told to.

What it is told lies in a queue; what requests gain goes out by the outbox. Every request that it was given
gets exactly one finished output: also when it is aborted, when its step fails or never ends, and when
the engine dies.
"""

import queue
from collections.abc import Collection
from threading import Thread

import structlog

from server.engine.background import Background
from server.engine.backlog import Backlog
from server.engine.commands import (
    Abort,
    Begin,
    Cancel,
    Command,
    DropUnloaded,
    Stop,
    Submit,
)
from server.engine.core import EngineCore
from server.engine.outbox import Outbox
from server.engine.request import Request, RequestOutput
from server.engine.watchdog import Watchdog
from server.errors import DeviceLost, EngineDead, FathomError, QueueTimeout

log = structlog.get_logger(__name__)


class EngineThread(Thread):
    """Steps and commands of one core, in turn, until it is told to stop."""

    def __init__(
        self,
        core: EngineCore,
        outbox: Outbox,
        backlog: Backlog,
        *,
        background_share: float,
        step_timeout_s: float | None,
    ) -> None:
        """step_timeout_s: how long a step may take before it is stuck."""
        super().__init__(name="fathom-engine", daemon=True)
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.stats = core.stats()
        """As of the last step."""
        self.is_serving = True
        """False once the thread has ended, or does not come back from a step."""
        self._refusal: FathomError | None = None
        """Why no request is taken any more."""
        self._core = core
        self._outbox = outbox
        self._backlog = backlog
        self._background = Background(
            core.runner,
            share=background_share,
            max_step_tokens=core.scheduler.max_num_batched_tokens,
        )
        self._is_stuck = False
        self._watchdog = Watchdog(step_timeout_s, self._give_up) if step_timeout_s else None
        core.runner.before_forward = outbox.deliver

    def start(self) -> None:
        """See `Thread.start`."""
        super().start()
        if self._watchdog is not None:
            self._watchdog.start()

    def check_accepting(self) -> None:
        """Raise what ended this engine, if it takes no request any more."""
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)

    def end_streams(self, error: FathomError, but: Collection[str] = ()) -> list[str]:
        """Take no request any more, and end those that are here, with this error. Any thread may."""
        self._refusal = self._refusal or error
        request_ids = [
            request_id for request_id in list(self._outbox.mailboxes) if request_id not in but
        ]
        self._outbox.deliver(
            RequestOutput(request_id, finished=True, error=error) for request_id in request_ids
        )
        return request_ids

    def stop(self, timeout_s: float) -> None:
        """Abort what is left and end, unless it is stuck in a step: then it is left behind. Idempotent."""
        self.commands.put(Stop())
        if self._watchdog is not None:
            self._watchdog.stop()
        if not self._is_stuck:
            self.join(timeout_s)

    def run(self) -> None:
        """See `Thread.run`."""
        ended: list[RequestOutput] = []
        error = EngineDead("the engine has stopped")
        try:
            while self._take_commands():
                self._step()
            if not self._is_stuck:
                ended = self._core.close()
                self.stats = self._core.stats()
        except DeviceLost as lost:
            log.exception("the device is lost")
            error = lost
        except BaseException:
            # What the core holds is of no use any more; its streams still end.
            log.exception("the engine thread died")
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            self.is_serving = False
            self._outbox.deliver(ended)
            self._background.close(error)
            self._refuse_commands(error)
            # A request that was still in the queue has no output from the core.
            self.end_streams(error, but={output.request_id for output in ended})

    def _step(self) -> None:
        if self._watchdog is not None:
            self._watchdog.step_begins()
        for request_id in self._backlog.overdue():
            self._time_out(request_id)
        outputs = self._core.step()
        for sequence in self._core.scheduler.admitted:
            self._backlog.leave(sequence.request.id)
        self.stats = self._core.stats()  # first: who has an output finds it counted
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
        self.is_serving = False
        error = EngineDead(
            f"a step has taken longer than {self._watchdog.timeout_s:g} s: it is stuck"
        )
        log.error(
            "a step is stuck",
            timeout_s=self._watchdog.timeout_s,
            requests=len(self._outbox.mailboxes),
        )
        self.commands.put(Stop())
        self.end_streams(error)

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
                self.stats = self._core.stats()  # aborts may have changed them since the last step
            try:
                command = self.commands.get(block=not has_work and not self._background.has_tasks)
            except queue.Empty:
                return True
            match command:
                case Stop():
                    return False
                case Abort(request_id):
                    output = self._core.abort(request_id)
                    if output is not None:
                        self._outbox.deliver([output])
                case Submit(request):
                    self._add(request)
                case DropUnloaded():
                    self._core.runner.slots.look_for_unwanted()
                case Begin(task):
                    self._background.add(task)
                case Cancel(task):
                    self._background.cancel(task)

    def _refuse_commands(self, error: EngineDead) -> None:
        """Whoever began background work too late to be seen must not wait for it for ever."""
        while not self.commands.empty():
            command = self.commands.get()
            if isinstance(command, Begin) and command.task.result.set_running_or_notify_cancel():
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
