"""The time that an HTTP request may take, waited for once a token."""

import asyncio
from types import TracebackType


class Deadline:
    """Ends whichever wait it finds when its time has come: `with deadline:` around each of them.

    Does what `asyncio.timeout_at` does by the same means (cancel, then uncancel), with one timer for all
    of them: a timer for each was an eighth of what the event loop did for a token.
    """

    def __init__(self, at_s: float) -> None:
        """at_s: by the running loop's clock. `close` ends it."""
        self._timer = asyncio.get_running_loop().call_at(at_s, self._come)
        self._waiting: asyncio.Task[object] | None = None
        self._num_cancelling = 0
        self._has_come = False

    def close(self) -> None:
        """It comes no more."""
        self._timer.cancel()

    def __enter__(self) -> None:
        """Raises TimeoutError where it has come already."""
        if self._has_come:
            raise TimeoutError
        task = self._waiting = asyncio.current_task()
        assert task is not None
        self._num_cancelling = task.cancelling()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises TimeoutError where it came during the wait, unless others cancel the task as well."""
        task, self._waiting = self._waiting, None
        assert task is not None
        if self._has_come:
            is_its_own = task.uncancel() <= self._num_cancelling
            if is_its_own and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _come(self) -> None:
        self._has_come = True
        if self._waiting is not None:
            self._waiting.cancel()
