"""Work between steps: it gets its share, ends with whoever wanted it, and fails alone."""

import asyncio
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from boundary.calibration import calibrate_slices
from boundary.dataset import Sample
from boundary.options import CalibrationOptions
from server.engine import background as background_module
from server.engine.async_engine import AsyncEngine
from server.engine.background import IDLE_FACTOR, Background, Task
from server.engine.core import EngineCore
from server.engine.protocol import SliceHost
from server.errors import EngineDead, GenerationError
from tests.engine.test_async_engine import consume, run_async, started
from tests.parity.zoo import random_prompt
from tests.tiny import BASE, Tiny, make_core, make_request, num_hooks

MAX_STEP_TOKENS = 100
SAMPLES = [
    Sample(random_prompt(5 + n % 4, seed=n), random_prompt(3, seed=50 + n), "") for n in range(36)
]


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(background_module.time, "monotonic", lambda: self.now)


class Loop:
    """An event loop that does at once what it is told."""

    def call_soon_threadsafe(self, callback: Any, *args: Any) -> None:
        callback(*args)


class ClosedLoop:
    def call_soon_threadsafe(self, callback: Any, *args: Any) -> None:
        raise RuntimeError("Event loop is closed")


def task_of(slices: Generator[Any, None, Any], loop: Any = None) -> tuple[Task, list[Any]]:
    seen: list[Any] = []
    return Task(lambda _: slices, loop or Loop(), seen.append), seen


@pytest.fixture
def core(tiny: Tiny) -> Iterator[EngineCore]:
    core = make_core(tiny, adapter_root=tiny.adapter_root)
    yield core
    core.close()


def make_background(core: EngineCore, share: float = 0.25) -> Background:
    return Background(core.runner, share=share, max_step_tokens=MAX_STEP_TOKENS)


@pytest.mark.parametrize(("share", "pause"), [(0.1, 9.0), (0.25, 3.0), (0.5, 1.0)])
def test_busy_engines_give_their_share_and_no_more(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, share: float, pause: float
) -> None:
    """A slice of one second is followed by `pause` seconds without one."""
    clock = Clock(monkeypatch)

    def slices() -> Generator[int, None, None]:
        for number in range(100):
            clock.now += 1.0
            yield number

    task, seen = task_of(slices())
    background = make_background(core, share)
    background.add(task)
    background.advance(is_busy=True)
    assert seen == [0]
    clock.now += pause - 0.01
    background.advance(is_busy=True)
    assert seen == [0]
    clock.now += 0.02
    background.advance(is_busy=True)
    assert seen == [0, 1]
    background.close(EngineDead("over"))


def test_idle_engines_do_not_wait(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def slices() -> Generator[int, None, str]:
        for number in range(5):
            clock.now += 1.0
            yield number
        return "found"

    task, seen = task_of(slices())
    background = make_background(core, 0.01)
    background.add(task)
    for _ in range(6):
        background.advance(is_busy=False)
    assert seen == [0, 1, 2, 3, 4]
    assert task.result.result(timeout=0) == "found"
    assert not background.has_tasks


def test_slices_are_small_while_requests_run(core: EngineCore) -> None:
    allowed: list[int] = []

    def make(host: SliceHost) -> Generator[None, None, None]:
        while True:
            allowed.append(host.max_tokens())
            yield

    background = make_background(core, share=1.0)
    background.add(Task(make, Loop(), lambda _: None))  # type: ignore[arg-type]
    for is_busy in (True, False, True):
        background.advance(is_busy=is_busy)
    assert allowed == [MAX_STEP_TOKENS, IDLE_FACTOR * MAX_STEP_TOKENS, MAX_STEP_TOKENS]
    background.close(EngineDead("over"))


def test_tasks_run_one_after_the_other_and_fail_alone(core: EngineCore) -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise ZeroDivisionError("a bug")

    def refused() -> Generator[int, None, None]:
        raise ValueError("sample 3 is bad")
        yield

    def good() -> Generator[int, None, int]:
        yield 1
        return 7

    tasks = [task_of(slices)[0] for slices in (failing(), refused(), good())]
    background = make_background(core)
    for task in tasks:
        background.add(task)
    while background.has_tasks:
        background.advance(is_busy=False)
    with pytest.raises(GenerationError, match="a bug"):
        tasks[0].result.result(timeout=0)
    with pytest.raises(ValueError, match="sample 3 is bad"):
        tasks[1].result.result(timeout=0)
    assert tasks[2].result.result(timeout=0) == 7


def test_who_is_not_waited_for_ends(core: EngineCore) -> None:
    ended: list[str] = []

    def slices(name: str) -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            ended.append(name)

    cancelled, orphan = task_of(slices("cancelled"))[0], task_of(slices("orphan"), ClosedLoop())[0]
    unwanted: Future[Any] = Future()
    unwanted.cancel()
    background = make_background(core)
    background.add(Task(lambda _: slices("unwanted"), Loop(), print, unwanted))  # type: ignore[arg-type]
    assert not background.has_tasks
    background.add(cancelled)
    background.advance(is_busy=False)
    background.cancel(cancelled)
    background.cancel(cancelled)
    background.add(orphan)
    background.advance(is_busy=False)
    assert ended == ["cancelled", "orphan"]
    assert not background.has_tasks


def test_a_calibration_runs_beside_requests_and_changes_none_of_their_tokens(
    tiny: Tiny, core: EngineCore
) -> None:
    """Requests and a sweep over the same adapter and model, on one engine's thread."""

    async def scenario(engine: AsyncEngine) -> None:
        await engine.load_adapter("a", tiny.adapter("a"))
        adapter = await engine.resolve("a")
        lora = await engine.select("a", 2)
        prompt = random_prompt(9, seed=1)

        async def ask(name: str) -> tuple[int, ...]:
            request = make_request(name, prompt, lora, max_tokens=12)
            return tuple((await consume(engine.generate(request))).token_ids(name))

        alone = await ask("alone")
        stages: list[str] = []

        def make(host: SliceHost) -> Generator[Any, None, Any]:
            with host.rows(adapter) as rows:
                return (
                    yield from calibrate_slices(
                        host.model,
                        SAMPLES,
                        CalibrationOptions(),
                        rows=rows,
                        full_depth=adapter.max_depth,
                        max_tokens=host.max_tokens,
                    )
                )

        job = asyncio.ensure_future(engine.run_slices(make, lambda p: stages.append(p.stage)))
        beside = []
        while not job.done():
            beside.append(await ask(f"beside {len(beside)}"))
        calibration = await job
        assert calibration.scores.shape == (len(SAMPLES), 5)
        assert set(stages) >= {"score", "lens", "norms"}
        assert len(beside) > 1
        assert set(beside) == {alone}

    with started(core) as engine:
        run_async(lambda: scenario(engine))
    assert num_hooks(core.runner.model) == 0


def test_cancelling_gives_the_lent_slot_back(tiny: Tiny, core: EngineCore) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.load_adapter("a", tiny.adapter("a"))
        adapter = await engine.resolve("a")
        has_begun = asyncio.Event()

        def make(host: SliceHost) -> Generator[int, None, None]:
            with host.rows(adapter):
                while True:
                    yield 1

        job = asyncio.ensure_future(engine.run_slices(make, lambda _: has_begun.set()))
        await has_begun.wait()
        assert core.runner.slots._lent
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        # Commands are taken in their order: once this is answered the cancel was carried out.
        await consume(engine.generate(make_request("after", (1, 2, 3), BASE, max_tokens=1)))
        assert not core.runner.slots._lent

    with started(core) as engine:
        run_async(lambda: scenario(engine))


def test_a_stopped_engine_ends_background_work(tiny: Tiny, core: EngineCore) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        has_begun = asyncio.Event()

        def make(_: SliceHost) -> Generator[int, None, None]:
            while True:
                yield 1

        job = asyncio.ensure_future(engine.run_slices(make, lambda _: has_begun.set()))
        await has_begun.wait()
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDead):
            await job
        with pytest.raises(EngineDead):
            await engine.run_slices(make, print)

    with started(core) as engine:
        run_async(lambda: scenario(engine))
