"""The two loops over a client that answers at once or when it is told to."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from server.bench.load import Counters, Piece, RequestFailed, drive
from server.bench.mix import Choice
from server.bench.workload import WorkItem


class FakeClient:
    """Streams a token a turn of the loop; fails prompts of token 13."""

    def __init__(self, *, num_short: int = 0) -> None:
        self.num_live = 0
        self.max_live = 0
        self.num_steps = 0
        self.num_short = num_short

    async def stream(self, item: WorkItem) -> AsyncIterator[Piece]:
        self.num_live += 1
        self.max_live = max(self.max_live, self.num_live)
        try:
            for index in range(item.output_len - self.num_short):
                await asyncio.sleep(0)
                if item.prompt == (13,):
                    raise RequestFailed("unlucky")
                self.num_steps += 1
                yield Piece(1, index + 1, 0)
        finally:
            self.num_live -= 1

    async def counters(self) -> Counters:
        return Counters(self.num_steps, 0, 0, 0, 0, 0)


def items(number: int, *, gap_s: float = 0.0) -> list[WorkItem]:
    return [WorkItem((index,), 3, Choice(), index * gap_s) for index in range(number)]


def test_a_closed_loop_takes_an_item_when_somebody_is_free_for_it() -> None:
    client = FakeClient()
    live: list[int] = []

    def made() -> Iterator[WorkItem]:
        for item in items(6):
            live.append(client.num_live)
            yield item

    result = asyncio.run(drive(client, made(), 2))
    assert len(result.timings) == 6
    assert max(live) < 2


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    client = FakeClient()
    result = asyncio.run(drive(client, items(10), 4))
    assert client.max_live == 4
    assert len(result.timings) == 10
    assert all(timing.num_output_tokens == 3 for timing in result.timings)
    assert all(len(timing.piece_s) == 3 for timing in result.timings)
    assert result.counters is not None
    assert result.counters.num_steps == 30


def test_counters_are_of_this_run_alone() -> None:
    client = FakeClient()
    asyncio.run(drive(client, items(2), 1))
    result = asyncio.run(drive(client, items(1), 1))
    assert result.counters is not None
    assert result.counters.num_steps == 3


def test_an_open_loop_waits_for_nobody() -> None:
    client = FakeClient()
    result = asyncio.run(drive(client, items(10), None))
    assert client.max_live == 10
    assert len(result.timings) == 10


def test_an_open_loop_counts_latency_from_the_arrival() -> None:
    result = asyncio.run(drive(FakeClient(), items(3, gap_s=0.01), None))
    assert [timing.start_s for timing in result.timings] == [0.0, 0.01, 0.02]
    assert all(timing.piece_s[0] >= timing.start_s for timing in result.timings)


def test_one_failure_does_not_end_the_run() -> None:
    result = asyncio.run(drive(FakeClient(), items(20), 4))
    assert [timing.error for timing in result.timings if timing.error] == ["unlucky"]
    assert len(result.timings) == 20


def test_a_completion_that_ends_early_is_a_failure() -> None:
    (timing,) = asyncio.run(drive(FakeClient(num_short=1), items(1), 1)).timings
    assert timing.error == "2 tokens came, 3 were asked for"
