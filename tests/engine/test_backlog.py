"""What may wait, in tokens and in time; on a clock that a test turns."""

import asyncio
from typing import Any

import pytest

from server.engine.async_engine import AsyncEngine
from server.engine.backlog import Backlog
from server.engine.core import EngineCore
from server.errors import QueueFull, QueueTimeout
from tests.engine.test_async_engine import PROMPT, Gate, consume, first_output, run_async, unending
from tests.tiny import Tiny, assert_everything_is_back, make_core, make_request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def of(name: str, prompt: int, max_tokens: int, n: int = 1) -> Any:
    return make_request(name, range(prompt), max_tokens=max_tokens, n=n)


def test_tokens_that_wait_are_bounded() -> None:
    backlog = Backlog(max_tokens=100)
    backlog.enter(of("a", 10, 20, n=2))
    assert backlog.num_tokens == 50
    backlog.enter(of("b", 30, 20))
    with pytest.raises(QueueFull, match=r"100 tokens .* 2 .* limit of 100") as refusal:
        backlog.enter(of("c", 1, 1))
    assert refusal.value.retry_after_s > 0
    backlog.leave("a")
    backlog.leave("a")
    assert backlog.num_tokens == 50
    backlog.enter(of("c", 1, 1))


def test_nobody_is_too_large_for_an_empty_queue() -> None:
    backlog = Backlog(max_tokens=10)
    backlog.enter(of("large", 100, 100))
    with pytest.raises(QueueFull):
        backlog.enter(of("small", 1, 1))


def test_who_waits_too_long_is_named_in_order() -> None:
    clock = Clock()
    backlog = Backlog(timeout_s=5.0, clock=clock)
    for now, name in enumerate(("a", "b", "c")):
        clock.now = float(now)
        backlog.enter(of(name, 1, 1))
    clock.now = 4.9
    assert backlog.overdue() == []
    backlog.leave("a")
    clock.now = 6.5
    assert backlog.overdue() == ["b"]
    clock.now = 100.0
    assert backlog.overdue() == ["b", "c"]
    assert Backlog(clock=clock).overdue() == []


def serve_one_after_the_other(core: EngineCore, clock: Clock, timeout_s: float | None) -> list[Any]:
    """Room for one sequence; a second request waits while the clock is turned by a minute."""
    gate = Gate(core)
    engine = AsyncEngine(core, max_live_requests=8, backlog=Backlog(None, timeout_s, clock))

    async def scenario() -> list[Any]:
        running = engine.generate(unending("running"))
        gate.release(1)
        await first_output(running)
        waiting = asyncio.create_task(consume(engine.generate(make_request("waits", PROMPT))))
        await asyncio.sleep(0)
        num_waits = gate.num_waits
        gate.release(1)  # its last before the clock is turned
        while gate.num_waits <= num_waits:
            await asyncio.sleep(0)
        clock.now += 60.0
        gate.release(2)
        if timeout_s is None:
            await running.aclose()
        gate.release(1000)
        outbox = await waiting
        await running.aclose()
        return outbox.outputs["waits"]

    try:
        return run_async(scenario)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("timeout_s", [59.0, None])
def test_a_request_that_waits_too_long_ends_and_who_runs_does_not(
    tiny: Tiny, timeout_s: float | None
) -> None:
    core = make_core(tiny, max_num_seqs=1)
    *_, last = serve_one_after_the_other(core, Clock(), timeout_s)
    if timeout_s is None:
        assert last.error is None
        assert last.num_output_tokens == 6
    else:
        assert isinstance(last.error, QueueTimeout)
        assert "59 s" in last.error.message
        assert last.error.status == 503
    assert_everything_is_back(core)


def test_what_runs_or_has_ended_is_not_in_the_backlog(tiny: Tiny) -> None:
    core = make_core(tiny, max_num_seqs=1)
    gate = Gate(core)
    backlog = Backlog(max_tokens=300)
    engine = AsyncEngine(core, max_live_requests=8, backlog=backlog)

    async def scenario() -> None:
        running = engine.generate(unending("running"))  # 9 + 200 tokens
        gate.release(1)
        await first_output(running)
        while gate.num_waits < 2:
            await asyncio.sleep(0)
        assert backlog.num_tokens == 0
        waiting = asyncio.create_task(consume(engine.generate(unending("waits"))))
        await asyncio.sleep(0)
        assert backlog.num_tokens == 209
        with pytest.raises(QueueFull, match="tokens"):
            await consume(engine.generate(unending("too many")))
        assert set(engine._outbox.mailboxes) == {"running", "waits"}
        waiting.cancel()
        await asyncio.wait([waiting])
        assert backlog.num_tokens == 0
        await running.aclose()
        gate.release(10)

    run_async(scenario)
    engine.shutdown()
    assert_everything_is_back(core)
