"""Event loops on one side, the engine thread on the other: who ends what, and who waits for whom.

The engine's thread is held and let go by events and semaphores, never by the clock; a time limit is
only there to turn a hang into a failure.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.config import Settings
from server.engine import registry as registry_module
from server.engine.arrivals import Arrivals
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore
from server.engine.request import CalibratedDepth, Request, RequestOutput
from server.errors import AdapterError, BadRequest, Conflict, EngineDead, NotFound, QueueFull
from server.model.checkpoint import read_checkpoint
from server.model.runner import ModelRunner
from tests.parity.zoo import random_prompt
from tests.tiny import BASE_NAME, Outbox, Tiny, make_core, make_request, num_hooks

PROMPT = random_prompt(9, seed=1)
LIMIT_S = 60


@contextmanager
def started(core: EngineCore, max_live_requests: int = 8) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(core, max_live_requests=max_live_requests)
    try:
        yield engine
    finally:
        engine.shutdown()
        assert not engine._thread.is_alive()
        assert num_hooks(core.runner.model) == 0


@pytest.fixture
def core(tiny: Tiny) -> EngineCore:
    return make_core(tiny, adapter_root=tiny.model_path.parent)


@pytest.fixture
def engine(core: EngineCore) -> Iterator[AsyncEngine]:
    with started(core) as running:
        yield running


class Gate:
    """Lets the engine thread take one step for each `release`."""

    def __init__(self, core: EngineCore) -> None:
        self._permits = threading.Semaphore(0)
        self.num_waits = 0
        self._step = core.step
        core.step = self._wait_and_step  # type: ignore[method-assign]

    def _wait_and_step(self) -> list[RequestOutput]:
        self.num_waits += 1
        assert self._permits.acquire(timeout=LIMIT_S)
        return self._step()

    def release(self, num_steps: int) -> None:
        self._permits.release(num_steps)


def run_async(scenario: Callable[[], Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(scenario(), LIMIT_S)

    return asyncio.run(limited())


async def consume(outputs: AsyncIterator[RequestOutput]) -> Outbox:
    outbox = Outbox()
    async for output in outputs:
        outbox.take([output])
    return outbox


async def first_output(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return await anext(aiter(outputs))


def unending(request_id: str) -> Request:
    """A request that runs longer than any test needs."""
    return make_request(request_id, PROMPT, max_tokens=200)


# ---------------------------------------------------------------- streams


def test_two_event_loops_share_one_engine(engine: AsyncEngine) -> None:
    """Each loop's outputs are put on that loop's own queue, from the engine's thread."""
    both_run = threading.Barrier(2)
    outboxes: dict[str, Outbox] = {}

    def consumer(name: str) -> None:
        async def scenario() -> None:
            outputs = engine.generate(make_request(name, PROMPT, max_tokens=12))
            outbox = Outbox()
            async for output in outputs:
                if not outbox.outputs:
                    both_run.wait(LIMIT_S)
                outbox.take([output])
            outboxes[name] = outbox

        run_async(scenario)

    threads = [threading.Thread(target=consumer, args=(name,)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(outboxes["x"].token_ids("x")) == 12
    assert outboxes["x"].token_ids("x") == outboxes["y"].token_ids("y")
    assert outboxes["x"].finish_reasons("x") == {0: "length"}


def test_two_consumers_on_one_loop_run_in_the_same_steps(
    core: EngineCore, engine: AsyncEngine
) -> None:
    async def scenario() -> list[Outbox]:
        requests = (make_request(name, PROMPT, max_tokens=12) for name in ("x", "y"))
        return await asyncio.gather(*(consume(engine.generate(request)) for request in requests))

    x, y = run_async(scenario)
    assert x.token_ids("x") == y.token_ids("y")
    assert core.stats().num_generated_tokens == 24
    assert core.stats().num_steps < 24


def test_an_idle_engine_is_asked_for_nothing_before_those_that_came_begin(
    core: EngineCore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[Outbox]:
        may_begin = asyncio.Event()

        async def held(_: Arrivals) -> None:
            await may_begin.wait()

        monkeypatch.setattr(Arrivals, "together", held)
        given_up, *kept = (
            asyncio.create_task(consume(engine.generate(make_request(name, PROMPT, max_tokens=4))))
            for name in ("given up", "x", "y")
        )
        await asyncio.sleep(0)
        assert engine._thread.commands.empty()
        given_up.cancel()
        may_begin.set()
        return await asyncio.gather(*kept)

    for name, outbox in zip(("x", "y"), run_async(scenario), strict=True):
        assert len(outbox.token_ids(name)) == 4
    assert core.stats().num_generated_tokens == 8


def test_a_busy_engine_is_asked_at_once(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> Outbox:
        running = engine.generate(unending("first"))
        await first_output(running)
        monkeypatch.setattr(Arrivals, "together", None)  # whoever called it would fail
        return await consume(engine.generate(make_request("second", PROMPT, max_tokens=4)))

    assert len(run_async(scenario).token_ids("second")) == 4


def test_an_output_is_counted_before_it_is_delivered(
    core: EngineCore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, int]] = []
    hold = engine._outbox.hold

    def count_and_hold(outputs: list[RequestOutput]) -> None:
        counts.extend((engine.stats().num_generated_tokens, o.num_output_tokens) for o in outputs)
        hold(outputs)

    monkeypatch.setattr(engine._outbox, "hold", count_and_hold)

    async def scenario() -> None:
        await consume(engine.generate(make_request("x", PROMPT, max_tokens=4)))

    run_async(scenario)
    assert counts == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_outputs_go_out_when_the_next_step_begins_to_compute(
    core: EngineCore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the Python before it, which the readers would hold up; and the last ones at once."""
    monkeypatch.setattr(ModelRunner, "lets_go_of_python", True)  # as a larger model would
    held_by: list[int] = []  # outputs that wait, at each step's begin and when it computes
    outbox, step = engine._outbox, core.step
    before = core.runner.before_forward

    def deliver_and_look() -> None:
        held_by.append(outbox.num_held)
        before()
        assert outbox.num_held == 0

    def look_and_step() -> list[RequestOutput]:
        held_by.append(outbox.num_held)
        return step()

    monkeypatch.setattr(core.runner, "before_forward", deliver_and_look)
    monkeypatch.setattr(core, "step", look_and_step)

    async def scenario() -> list[Outbox]:
        requests = (make_request(name, PROMPT, max_tokens=12) for name in ("x", "y"))
        return await asyncio.gather(*(consume(engine.generate(request)) for request in requests))

    x, y = run_async(scenario)
    assert x.token_ids("x") == y.token_ids("y")
    assert 2 in held_by
    assert held_by[0] == outbox.num_held == 0


def test_outputs_do_not_wait_for_a_step_that_computes_nothing(
    core: EngineCore, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in which nobody can be scheduled."""
    monkeypatch.setattr(ModelRunner, "lets_go_of_python", True)
    step, is_idle = core.step, threading.Event()
    held_by: list[int] = []

    def step_or_idle() -> list[RequestOutput]:
        held_by.append(engine._outbox.num_held)
        return [] if is_idle.is_set() else step()

    monkeypatch.setattr(core, "step", step_or_idle)

    async def scenario() -> int:
        outputs = engine.generate(unending("x"))
        first = await first_output(outputs)
        is_idle.set()
        while len(held_by) < 3 or any(held_by[-2:]):
            await asyncio.sleep(0)  # for ever, where an output waits as long as that
        await outputs.aclose()
        return first.num_output_tokens

    assert run_async(scenario) > 0
    is_idle.clear()


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_who_stops_listening_gives_the_blocks_back(
    core: EngineCore, engine: AsyncEngine, way: str
) -> None:
    async def scenario() -> None:
        outputs = engine.generate(unending("gone"))
        await first_output(outputs)
        if way == "close":
            await outputs.aclose()
        else:
            task = asyncio.create_task(consume(outputs))
            await asyncio.sleep(0)  # let it begin to wait
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # Commands are carried out in order: when this one has run, the abort has.
        await consume(engine.generate(make_request("after", PROMPT, max_tokens=1)))

    run_async(scenario)
    assert "gone" not in core._groups
    assert core.blocks.num_free == core.blocks.num_blocks
    assert core.stats().num_generated_tokens < 200
    assert engine._outbox.mailboxes == {}


def test_a_stream_that_is_full_answers_at_once(core: EngineCore) -> None:
    with started(core, max_live_requests=1) as engine:

        async def scenario() -> None:
            running = engine.generate(unending("running"))
            await first_output(running)
            with pytest.raises(QueueFull, match="1 requests") as refusal:
                await consume(engine.generate(make_request("more", PROMPT)))
            assert refusal.value.retry_after_s > 0
            await running.aclose()
            after = await consume(engine.generate(make_request("after", PROMPT)))
            assert len(after.token_ids("after")) == 6

        run_async(scenario)


def test_a_request_id_in_use_is_refused(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        running = engine.generate(unending("x"))
        await first_output(running)
        with pytest.raises(Conflict):
            await consume(engine.generate(make_request("x", PROMPT)))
        await running.aclose()

    run_async(scenario)


@pytest.mark.parametrize("is_ours", [True, False])
def test_what_cannot_be_added_ends_alone(core: EngineCore, is_ours: bool) -> None:
    if not is_ours:
        core.grammars = None  # type: ignore[assignment]  # an AttributeError when it is asked
    bad = make_request("bad", () if is_ours else PROMPT, grammar=None if is_ours else "g")
    with started(core) as engine:

        async def scenario() -> list[Outbox]:
            good = make_request("good", PROMPT)
            return await asyncio.gather(
                consume(engine.generate(bad)), consume(engine.generate(good))
            )

        refused, good = run_async(scenario)
        assert engine.is_alive
    error = refused.last("bad").error
    assert isinstance(error, BadRequest) == is_ours
    assert error is not None
    assert len(good.token_ids("good")) == 6


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("broken", ["step", "step and close", "stats"])
def test_when_the_thread_dies_every_stream_ends(core: EngineCore, broken: str) -> None:
    gate = Gate(core)
    is_broken = threading.Event()
    methods = {name: getattr(core, name) for name in broken.split(" and ")}

    def breaking(name: str) -> Callable[[], Any]:
        def method() -> Any:
            if is_broken.is_set():
                raise RuntimeError("broken")
            return methods[name]()

        return method

    for name in methods:
        setattr(core, name, breaking(name))
    with started(core) as engine:

        async def scenario() -> list[Outbox]:
            running = asyncio.create_task(consume(engine.generate(unending("running"))))
            gate.release(1)
            while gate.num_waits < 2:
                await asyncio.sleep(0)
            is_broken.set()
            queued = asyncio.create_task(consume(engine.generate(unending("queued"))))
            await asyncio.sleep(0)
            gate.release(1)
            return await asyncio.gather(running, queued)

        try:
            running, queued = run_async(scenario)
            assert isinstance(running.last("running").error, EngineDead)
            assert isinstance(queued.last("queued").error, EngineDead)
            engine._thread.join(LIMIT_S)
            assert not engine.is_alive
            with pytest.raises(EngineDead):
                run_async(lambda: consume(engine.generate(make_request("late", PROMPT))))
        finally:
            is_broken.clear()
            core.close()


def test_shutting_down_midway_ends_every_stream_once(core: EngineCore) -> None:
    gate = Gate(core)
    with started(core) as engine:

        async def scenario() -> tuple[Outbox, Outbox, list[RequestOutput]]:
            outputs = engine.generate(unending("running"))
            gate.release(1)
            await first_output(outputs)
            while gate.num_waits < 2:
                await asyncio.sleep(0)
            # The thread waits in its second step: what comes now lies in the queue until then.
            stop = asyncio.create_task(asyncio.to_thread(engine.shutdown))
            rest = asyncio.create_task(consume(outputs))
            while engine._thread.commands.empty():
                await asyncio.sleep(0)
            queued = asyncio.create_task(consume(engine.generate(unending("queued"))))
            await asyncio.sleep(0)
            mailbox = engine._outbox.mailboxes["running"]
            gate.release(1)
            await stop
            return await rest, await queued, list(mailbox._outputs)

        running, queued, unread = run_async(scenario)
        assert running.finish_reasons("running") == {0: "abort"}
        assert running.last("running").error is None
        assert isinstance(queued.last("queued").error, EngineDead)
        assert unread == []
        assert core.blocks.num_free == core.blocks.num_blocks
        assert engine.stats().num_running == 0
        engine.shutdown()  # once more does no harm


def test_a_stream_that_begins_as_the_thread_ends_does_not_wait_for_ever(
    engine: AsyncEngine,
) -> None:
    class LateStreams(dict[str, Any]):
        def __setitem__(self, request_id: str, stream: Any) -> None:
            engine.shutdown()  # after generate looked, before the stream is known
            super().__setitem__(request_id, stream)

    engine._outbox.mailboxes = LateStreams()
    with pytest.raises(EngineDead):
        run_async(lambda: consume(engine.generate(make_request("x", PROMPT))))
    assert engine._outbox.mailboxes == {}


def test_an_event_loop_that_is_gone_disturbs_no_other(
    core: EngineCore, engine: AsyncEngine
) -> None:
    loop = asyncio.new_event_loop()
    outputs = engine.generate(unending("left"))
    loop.run_until_complete(first_output(outputs))
    loop.close()
    after = run_async(lambda: consume(engine.generate(make_request("x", PROMPT))))
    assert len(after.token_ids("x")) == 6
    with pytest.raises(StopIteration):
        outputs.aclose().send(None)  # what the loop would have done
    run_async(lambda: consume(engine.generate(make_request("y", PROMPT))))
    assert "left" not in core._groups


# ---------------------------------------------------------------- adapters


class SlowDisk:
    """Reading a checkpoint waits for `ready`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reading = threading.Event()
        self.ready = threading.Event()
        self.num_reads = 0
        monkeypatch.setattr(registry_module, "read_checkpoint", self._read)

    def _read(self, path: Path, targets: Any, **limits: Any) -> Any:
        self.num_reads += 1
        self.is_reading.set()
        assert self.ready.wait(LIMIT_S), "nobody else could go on meanwhile"
        return read_checkpoint(path, targets, **limits)


def test_loading_holds_up_neither_the_loop_nor_the_requests(
    tiny: Tiny, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)

    async def scenario() -> None:
        loading = asyncio.create_task(engine.load_adapter("a", tiny.adapter("a")))
        while not disk.is_reading.is_set():
            await asyncio.sleep(0)
        outbox = await consume(engine.generate(make_request("x", PROMPT)))
        assert len(outbox.token_ids("x")) == 6
        assert engine.adapters() == []
        assert not loading.done()
        disk.ready.set()
        ref = await loading
        assert engine.adapters() == [ref]

    run_async(scenario)


def test_who_waits_for_a_cold_adapter_waits_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    core = make_core(tiny, adapter_root=tiny.adapter_root)
    with started(core) as engine:

        async def scenario() -> None:
            disk.ready.set()
            warm = await engine.select("b", 2)
            disk.ready.clear()
            disk.is_reading.clear()
            cold = [asyncio.create_task(engine.select("a", depth)) for depth in (1, 3)]
            while not disk.is_reading.is_set():
                await asyncio.sleep(0)
            assert await engine.select("b", 2) == warm
            outbox = await consume(engine.generate(make_request("x", PROMPT, warm)))
            assert len(outbox.token_ids("x")) == 6
            assert not any(task.done() for task in cold)
            disk.ready.set()
            one, three = await asyncio.gather(*cold)
            assert (one.depth, three.depth) == (1, 3)
            assert one.adapter is not None
            assert one.adapter == three.adapter
            assert disk.num_reads == 2  # b, and a once for both

        run_async(scenario)


def test_adapters_come_and_go_on_the_loop(tiny: Tiny, engine: AsyncEngine) -> None:
    async def scenario() -> None:
        ref = await engine.load_adapter("a", tiny.adapter("a"))
        selected = await engine.select("a", 2)
        assert selected.adapter == ref
        assert engine.calibrated_depth(ref) is None
        with pytest.raises(Conflict):
            await engine.load_adapter("a", tiny.adapter("b"))
        with pytest.raises(AdapterError):
            await engine.load_adapter("bad", tiny.model_path)
        await engine.unload_adapter("a")
        with pytest.raises(NotFound):
            await engine.select("a", 2)
        with pytest.raises(NotFound):
            await engine.unload_adapter("a")
        assert (await engine.select(BASE_NAME, None)).adapter is None
        with pytest.raises(BadRequest):
            await engine.check_grammar("no grammar")

    run_async(scenario)


def test_named_adapters_are_loaded_before_it_starts(tiny: Tiny) -> None:
    stages: list[tuple[str, int, int]] = []
    settings = Settings(
        model=str(tiny.model_path),
        device="cpu",
        kv_cache_bytes=1 << 20,
        adapter={"one": tiny.adapter("a"), "two": tiny.adapter("b")},
    )
    engine = AsyncEngine.from_settings(settings, lambda *stage: stages.append(stage))
    try:
        assert [ref.name for ref in engine.adapters()] == ["one", "two"]
        ended = {name for name, done, total in stages if done == total}
        assert ended == {name for name, _, _ in stages} == {"weights", "self-test", "adapters"}
        outbox = run_async(lambda: consume(engine.generate(make_request("x", PROMPT))))
        assert len(outbox.token_ids("x")) == 6
    finally:
        engine.shutdown()


def test_named_adapters_that_host_memory_does_not_hold_are_not_read_at_the_start(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def note(path: Path, targets: Any, **limits: Any) -> Any:
        read.append(path)
        return read_checkpoint(path, targets, **limits)

    monkeypatch.setattr("server.engine.registry.read_checkpoint", note)
    named = {"one": tiny.adapter("a"), "two": tiny.adapter("b"), "three": tiny.adapter("c")}
    settings = Settings(
        model=str(tiny.model_path),
        device="cpu",
        kv_cache_bytes=1 << 20,
        max_cpu_loras=1,
        adapter=named,
    )
    engine = AsyncEngine.from_settings(settings)
    try:
        assert read == [tiny.adapter("a")]
        assert [ref.name for ref in engine.adapters()] == ["one", "three", "two"]
        assert {engine.residency(ref) for ref in engine.adapters()} == {"host", "disk"}
        assert engine.adapter("two") in engine.adapters()
        assert engine.adapter("four") is None
        selection = run_async(lambda: engine.select("two", 1))
        assert selection.adapter is not None
        assert engine.residency(selection.adapter) == "host"
        assert read == [tiny.adapter("a"), tiny.adapter("b")]
    finally:
        engine.shutdown()


def test_how_deep_an_adapter_is_on_the_device_can_be_seen(tiny: Tiny) -> None:
    core = make_core(tiny, resident_depth="auto")
    engine = AsyncEngine(core, max_live_requests=4)
    try:
        ref = core.registry.load("a", tiny.adapter("a"))
        engine.set_calibrated_depths({str(ref.digest): CalibratedDepth(2, 1, 0.0)})
        for depth, resident in ((None, 2), (1, 2), (3, 3), (None, 3)):
            selection = run_async(lambda depth=depth: engine.select("a", depth))
            request = make_request(f"{depth}-{resident}", PROMPT, selection)
            run_async(lambda request=request: consume(engine.generate(request)))
            assert engine.stats().resident_depths == {ref.uid: resident}
            assert engine.stats().lora_bytes == ref.num_bytes * resident // 4
            assert engine.residency(ref) == "device"
    finally:
        engine.shutdown()


@pytest.mark.parametrize("max_cpu_loras", [1, 8])
def test_a_named_adapter_that_is_refused_stops_the_start(
    tiny: Tiny, tmp_path: Path, max_cpu_loras: int
) -> None:
    settings = Settings(
        model=str(tiny.model_path),
        device="cpu",
        kv_cache_bytes=1 << 20,
        max_cpu_loras=max_cpu_loras,
        adapter={"good": tiny.adapter("a"), "bad": tmp_path},
    )
    with pytest.raises(AdapterError, match=r"adapter 'bad' at .*adapter_config.json is missing"):
        AsyncEngine.from_settings(settings)
