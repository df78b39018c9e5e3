"""Work in slices, done at one go."""

from collections.abc import Generator

import pytest

from boundary.progress import Progress, Stopped, drain


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
