"""Work in slices between steps, such as a calibration, that must not be felt by the requests.

Each task is a generator, advanced on the engine's thread: whatever it does between two yields is one
slice, and at a yield it holds nothing on the model. While there are requests to serve, slices get at
most `share` of the time and are asked to be small; when there are none, they run one after another.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import structlog

from server.engine.protocol import MakeSlices, Slices
from server.engine.request import AdapterRef
from server.errors import FathomError, GenerationError
from server.model.calibration_rows import CalibrationRows, calibration_rows
from server.model.checkpoint import LoraCheckpoint
from server.model.runner import ModelRunner

log = structlog.get_logger(__name__)

IDLE_FACTOR = 4
"""A slice of an idle engine may be this many times a full step: a request that comes then waits for
it, and smaller slices cost more in all."""


@dataclass(frozen=True, slots=True)
class RunnerHost:
    """A `protocol.SliceHost` over the runner that serves."""

    runner: ModelRunner
    max_tokens: Callable[[], int]

    @property
    def model(self) -> Any:
        """See `protocol.SliceHost`."""
        return self.runner.model

    def rows(self, adapter: AdapterRef) -> AbstractContextManager[CalibrationRows]:
        """See `protocol.SliceHost`."""
        assert isinstance(adapter.content, LoraCheckpoint)  # resolved adapters carry their weights
        return calibration_rows(self.runner, adapter.content)


@dataclass(eq=False, slots=True)
class Task:
    """One piece of work and who waits for it."""

    make: MakeSlices
    loop: asyncio.AbstractEventLoop
    on_progress: Callable[[Any], None]
    result: "Future[Any]" = field(default_factory=Future)
    slices: Slices | None = None


class Background:
    """The tasks of one engine, in the order they came; the first runs until it ends."""

    def __init__(self, runner: ModelRunner, *, share: float, max_step_tokens: int) -> None:
        self._host = RunnerHost(runner, self._max_tokens)
        self._share = share
        self._max_step_tokens = max_step_tokens
        self._tasks: deque[Task] = deque()
        self._is_busy = False
        self._resume_at = 0.0

    @property
    def has_tasks(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._tasks)

    def add(self, task: Task) -> None:
        """Queue a task, unless whoever wanted it has gone already."""
        if task.result.set_running_or_notify_cancel():
            self._tasks.append(task)

    def cancel(self, task: Task) -> None:
        """End a task where it stands; nothing for one that has ended."""
        if task in self._tasks:
            self._tasks.remove(task)
            self._close(task)

    def advance(self, *, is_busy: bool) -> None:
        """One slice of the first task, if it is due. `is_busy`: requests are running or waiting."""
        self._is_busy = is_busy
        began = time.monotonic()
        if not self._tasks or (is_busy and began < self._resume_at):
            return
        task = self._tasks[0]
        try:
            if task.slices is None:
                task.slices = task.make(self._host)
            progress = next(task.slices)
        except StopIteration as end:
            self._tasks.remove(task)
            task.result.set_result(end.value)
        except (FathomError, ValueError) as error:  # they say what whoever asked did wrong
            self._tasks.remove(task)
            task.result.set_exception(error)
        except Exception as error:
            log.exception("background work failed")
            self._tasks.remove(task)
            task.result.set_exception(GenerationError(str(error) or repr(error)))
        else:
            self._tell(task, progress)
        # What this slice took is `share` of the time until the next one.
        ended = time.monotonic()
        self._resume_at = ended + (ended - began) * (1 - self._share) / self._share

    def close(self, error: FathomError) -> None:
        """End everything; whoever waits gets `error`."""
        while self._tasks:
            task = self._tasks.popleft()
            self._close(task)
            task.result.set_exception(error)

    def _max_tokens(self) -> int:
        return self._max_step_tokens * (1 if self._is_busy else IDLE_FACTOR)

    def _tell(self, task: Task, progress: Any) -> None:
        try:
            task.loop.call_soon_threadsafe(task.on_progress, progress)
        except RuntimeError:  # its event loop has closed, and with it whoever wanted this
            self.cancel(task)

    def _close(self, task: Task) -> None:
        if task.slices is None:
            return
        try:
            task.slices.close()
        except Exception:
            log.exception("background work did not end cleanly")
