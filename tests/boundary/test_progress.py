"""Work in slices, done at one go."""

import threading
from collections.abc import Generator

import pytest

from boundary.progress import Progress, Stopped, aside, drain


def three(closed: list[bool]) -> Generator[Progress, None, str]:
    try:
        for done in range(4):
            yield Progress("stage", done, 3)
        return "found"
    finally:
        closed.append(True)


def test_everything_is_done_and_told() -> None:
    told: list[Progress] = []
    asked: list[int] = []
    found = drain(
        three([]), on_progress=told.append, should_stop=lambda: bool(asked.append(len(told)))
    )
    assert found == "found"
    assert [progress.done for progress in told] == [1, 2, 3]
    assert asked == [0, 1, 2]  # before each slice, and not when there is none left


@pytest.mark.parametrize("done", [0, 1, 2])
def test_being_told_to_stop_closes_the_work(done: int) -> None:
    told: list[Progress] = []
    closed: list[bool] = []
    with pytest.raises(Stopped, match=f"stopped after {done} of 3 in stage 'stage'"):
        drain(three(closed), on_progress=told.append, should_stop=lambda: len(told) == done)
    assert closed == [True]


def test_what_fails_outside_closes_the_work_too() -> None:
    closed: list[bool] = []

    def fail(progress: Progress) -> None:
        raise RuntimeError("no more paper")

    with pytest.raises(RuntimeError, match="no more paper"):
        drain(three(closed), on_progress=fail)
    assert closed == [True]


LIMIT_S = 60


def test_what_is_done_aside_is_waited_for_in_slices() -> None:
    may_end = threading.Event()

    def work() -> str:
        assert may_end.wait(LIMIT_S)
        return threading.current_thread().name

    slices = aside("choose", work)
    waiting = [next(slices) for _ in range(5)]
    assert (
        waiting == [Progress("choose", 0, 1)] * 5
    )  # and yet it has not ended: this thread is free
    may_end.set()
    assert drain(slices) != threading.current_thread().name


def test_what_fails_aside_fails_here() -> None:
    def work() -> None:
        raise ValueError("scores are not finite")

    with pytest.raises(ValueError, match="not finite"):
        drain(aside("choose", work))


def test_closing_does_not_wait_for_what_is_done_aside() -> None:
    may_end, has_ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(LIMIT_S)
        has_ended.set()

    slices = aside("choose", work)
    next(slices)
    slices.close()
    assert not has_ended.is_set()
    may_end.set()
    assert has_ended.wait(LIMIT_S)
