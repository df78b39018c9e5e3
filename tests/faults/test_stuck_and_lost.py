"""The engine that is gone: a device that is lost, a step that never ends. Whoever waits is told, once."""

import asyncio
import threading
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore
from server.engine.request import RequestOutput
from server.engine.watchdog import MIN_TICKS, Watchdog
from server.errors import DeviceLost, EngineDead
from server.exit_guard import EXIT_S, ExitGuard
from tests.engine.test_async_engine import LIMIT_S, PROMPT, consume, run_async, unending
from tests.tiny import Tiny, make_core, make_request


class Hanging:
    """The core's n-th step does not come back before it is told to."""

    def __init__(self, core: EngineCore, num_steps: int) -> None:
        self.is_hanging = threading.Event()
        self.may_go_on = threading.Event()
        self.num_steps = num_steps
        self._step = core.step
        core.step = self._hang  # type: ignore[method-assign]

    def _hang(self) -> list[RequestOutput]:
        self.num_steps -= 1
        if self.num_steps == 0:
            self.is_hanging.set()
            assert self.may_go_on.wait(LIMIT_S)
        return self._step()


def client_of(engine: AsyncEngine) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    return httpx.AsyncClient(transport=transport, base_url="http://fathom")


async def health(engine: AsyncEngine) -> dict[str, Any]:
    async with client_of(engine) as http:
        answers = [await http.get(path) for path in ("/health", "/ready")]
        answers.append(
            await http.post(
                "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
            )
        )
    assert [answer.status_code for answer in answers] == [503] * 3
    return answers[0].json()["error"]


def test_a_stuck_step_ends_every_stream_and_shows_in_health(tiny: Tiny) -> None:
    core = make_core(tiny)
    hanging = Hanging(core, num_steps=3)
    engine = AsyncEngine(core, max_live_requests=8, step_timeout_s=0.2)

    async def scenario() -> None:
        streams = [consume(engine.generate(unending(name))) for name in ("x", "y")]
        for outbox in await asyncio.gather(*streams):
            ((_, outputs),) = outbox.outputs.items()
            assert isinstance(outputs[-1].error, EngineDead)
            assert "0.2 s" in outputs[-1].error.message
        assert hanging.is_hanging.is_set()
        assert not engine.is_alive
        assert (await health(engine))["code"] == "engine_dead"
        with pytest.raises(EngineDead, match="stuck"):
            await consume(engine.generate(make_request("late", PROMPT)))

    run_async(scenario)
    engine.shutdown()  # does not wait for the thread
    assert engine._thread.is_alive()
    hanging.may_go_on.set()
    engine._thread.join(LIMIT_S)
    assert not engine._thread.is_alive(), "it came back, and ended"
    core.close()


def test_control_without_a_watchdog_they_wait(tiny: Tiny) -> None:
    core = make_core(tiny)
    hanging = Hanging(core, num_steps=2)
    engine = AsyncEngine(core, max_live_requests=8)

    async def scenario() -> None:
        stream = asyncio.create_task(consume(engine.generate(unending("x"))))
        await asyncio.to_thread(hanging.is_hanging.wait, LIMIT_S)
        await asyncio.sleep(0.5)
        assert not stream.done()
        assert engine.is_alive
        hanging.may_go_on.set()
        stream.cancel()

    run_async(scenario)
    engine.shutdown()


def never() -> None:
    pytest.fail("it is not stuck")


def test_a_step_is_stuck_when_it_was_seen_often_enough() -> None:
    """Wake-ups are counted: a paused process does not wake up, however long the pause."""
    dog = Watchdog(2.0, never)
    assert not any(dog.tick() for _ in range(100))  # nothing runs
    for _ in range(100):  # each step is another, as short as it may be
        dog.step_begins()
        assert not dog.tick()
        dog.step_ends()
    dog.step_begins()
    assert [dog.tick() for _ in range(MIN_TICKS + 2)] == [False] * (MIN_TICKS + 1) + [True]
    dog.step_ends()
    assert not dog.tick()


def test_a_lost_device_ends_every_stream(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(tiny)
    run_step = core.runner.run
    num_steps = 0

    def lost(batch: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps < 4:
            return run_step(batch)
        monkeypatch.setattr(core.runner, "is_device_lost", lambda: True)
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(core.runner, "run", lost)
    engine = AsyncEngine(core, max_live_requests=8)

    async def scenario() -> None:
        streams = [consume(engine.generate(unending(name))) for name in ("x", "y")]
        for outbox in await asyncio.gather(*streams):
            ((_, outputs),) = outbox.outputs.items()
            assert isinstance(outputs[-1].error, DeviceLost)
        assert (await health(engine))["code"] == "engine_dead"

    run_async(scenario)
    engine.shutdown()
    assert num_steps == 4, "nobody was tried alone on a device that is gone"
    core.close()


# ---------------------------------------------------------------- the process


class Process:
    """What an exit guard sees and does, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.is_alive = True
        self.statuses: list[int] = []
        self.guard = ExitGuard(lambda: self.is_alive, self.statuses.append, lambda: self.now)
        self.guard.stop()  # its own thread: a test looks itself

    def look_at(self, now: float) -> list[int]:
        self.now = now
        self.guard.look()
        return self.statuses


def test_a_process_without_an_engine_is_ended_in_the_stated_time() -> None:
    process = Process()
    assert process.look_at(1e6) == []
    process.is_alive = False
    assert process.look_at(1e6 + 1) == []
    assert process.look_at(1e6 + EXIT_S) == []
    assert process.look_at(1e6 + 1 + EXIT_S) == [1]


def test_the_sooner_of_two_deadlines_counts() -> None:
    process = Process()
    process.guard.end_within(30 + EXIT_S)
    process.now = 110
    process.guard.end_within(EXIT_S)  # the second signal
    process.guard.end_within(1000)
    assert process.look_at(110 + EXIT_S - 0.1) == []
    assert process.look_at(110 + EXIT_S) == [1]
