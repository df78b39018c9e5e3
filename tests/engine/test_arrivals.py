"""Who comes together begins together; nobody who is alone, given up or followed for ever is kept."""

import asyncio
import time

import pytest

from server.engine import arrivals as arrivals_module
from server.engine.arrivals import GATHER_S, Arrivals

pytestmark = pytest.mark.anyio


async def turns(num: int) -> None:
    for _ in range(num):
        await asyncio.sleep(0)


async def test_one_that_is_alone_begins() -> None:
    arrivals = Arrivals()
    for _ in range(2):
        await arrivals.together()


async def test_those_that_come_in_time_begin_in_one_turn() -> None:
    arrivals = Arrivals()
    begun: list[int] = []

    async def come(number: int) -> None:
        await turns(number)
        await arrivals.together()
        begun.append(number)

    tasks = [asyncio.create_task(come(number)) for number in range(4)]
    while not begun:
        await asyncio.sleep(0)
    await turns(1)
    assert begun == [0, 1, 2, 3]
    await asyncio.gather(*tasks)


async def test_those_that_a_late_loop_still_reads_are_waited_for() -> None:
    arrivals = Arrivals()
    first = asyncio.create_task(arrivals.together())
    await turns(1)

    async def come() -> None:
        time.sleep(4 * GATHER_S)  # reading it keeps the loop
        await turns(2)
        assert not first.done()
        await arrivals.together()

    await asyncio.gather(*(come() for _ in range(3)))
    await first


async def test_who_is_given_up_is_no_matter_to_the_others() -> None:
    arrivals = Arrivals()
    tasks = [asyncio.create_task(arrivals.together()) for _ in range(3)]
    await turns(1)
    tasks[0].cancel()
    await asyncio.gather(*tasks[1:])
    assert tasks[0].cancelled()
    await arrivals.together()


async def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "LONGEST_S", 4 * GATHER_S)
    arrivals = Arrivals()
    first = asyncio.create_task(arrivals.together())
    others = []
    while not first.done():  # one a turn, so that no time is quiet
        others.append(asyncio.create_task(arrivals.together()))
        await asyncio.sleep(0)
    await asyncio.gather(*others)
    assert len(others) > 4
