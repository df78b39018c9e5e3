"""Texts of a calibration stand behind everybody's requests, and end all together."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from boundary.dataset import Sample
from server.calibration.generation import (
    LOWEST_PRIORITY,
    GenerationOptions,
    Place,
    Text,
    generate_texts,
    texts_max_tokens,
)
from server.engine.protocol import EngineStats
from server.errors import BadRequest, GenerationError, QueueFull
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

SAMPLES = [Sample((1, 2, index), (3, 4), "") for index in range(12)]
PLACES: list[Place] = [(index, depth) for index in range(12) for depth in (0, 6, 12)]
OPTIONS = GenerationOptions(max_num_seqs=20, busy_share=0.1, idle_share=0.5)


def idle(engine: FakeEngine, num_others: Callable[[], int] = int) -> None:
    """The engine serves nobody but this calibration, and perhaps `num_others`."""
    busy = engine.stats()

    def stats() -> EngineStats:
        num_ours = len(engine.requests) - engine_ended(engine)
        return replace(busy, num_running=num_ours + num_others(), num_waiting=0)

    engine.stats = stats  # type: ignore[method-assign]


def engine_ended(engine: FakeEngine) -> int:
    return len(engine.aborted)


async def write(
    engine: FakeEngine,
    places: list[Place] = PLACES,
    tell: Callable[[int], None] = lambda _: None,
    max_tokens: int = 3,
) -> dict[Place, Text]:
    adapter = engine.adapters()[0]
    return await generate_texts(engine, adapter, SAMPLES, places, max_tokens, OPTIONS, tell)


async def held(engine: FakeEngine) -> None:
    """Until the engine has all that it is given at once."""
    await engine.held.wait()
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("is_idle", "num_at_once"), [(False, 2), (True, 10)])
async def test_only_a_share_of_the_places_is_taken(
    engine: FakeEngine, is_idle: bool, num_at_once: int
) -> None:
    if is_idle:
        idle(engine)
    engine.hold_after = 0
    writing = asyncio.create_task(write(engine))
    await held(engine)
    assert len(engine.requests) == num_at_once
    engine.released.set()
    texts = await writing
    assert list(texts) != []
    assert set(texts) == set(PLACES)
    assert len(engine.requests) == len(PLACES)


async def test_every_text_is_a_greedy_request_of_the_lowest_priority(engine: FakeEngine) -> None:
    engine.reply = lambda request, _: f"{request.prompt_token_ids[-1]} at {request.lora.depth}"
    done: list[int] = []
    texts = await write(engine, tell=done.append, max_tokens=100)
    assert {place: text.text for place, text in texts.items()} == {
        (index, depth): f"{index} at {depth}" for index, depth in PLACES
    }
    assert not any(text.is_cut for text in texts.values())
    assert len({request.id for request in engine.requests}) == len(PLACES)
    for request in engine.requests:
        assert request.priority == LOWEST_PRIORITY > 2**31 - 1
        assert request.sampling.temperature == 0
        assert not request.sampling.ignore_eos
        assert request.sampling.max_tokens == 100
    assert (done[-1], done) == (len(PLACES), sorted(done))


async def test_no_text_is_longer_than_its_context_has_room(engine: FakeEngine) -> None:
    texts = await write(engine, [(0, 12)], max_tokens=10_000)
    assert engine.requests[0].sampling.max_tokens == engine.info.max_model_len - 3
    assert texts[0, 12].is_cut


async def test_a_full_queue_is_waited_for(engine: FakeEngine) -> None:
    engine.refusal = QueueFull("full", retry_after_s=0)
    writing = asyncio.create_task(write(engine, PLACES[:3]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.requests == []
    engine.refusal = None
    assert len(await writing) == 3


async def test_one_that_fails_ends_all(engine: FakeEngine) -> None:
    idle(engine)
    engine.fail_after, engine.error = 1, GenerationError("out of memory")
    with pytest.raises(GenerationError, match="out of memory"):
        await write(engine)
    assert len(engine.requests) < len(PLACES)
    assert len(engine.aborted) <= len(engine.requests)


async def test_cancelling_aborts_what_runs(engine: FakeEngine) -> None:
    engine.hold_after = 1
    writing = asyncio.create_task(write(engine))
    await held(engine)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert engine.aborted == [request.id for request in engine.requests]
    assert len(engine.requests) == 2


def test_texts_may_be_a_quarter_longer_than_the_longest_reference() -> None:
    samples = [Sample((1,), (2,) * length, "") for length in (3, 100, 7)]
    assert texts_max_tokens(samples, GenerationOptions(), 512) == 125
    assert texts_max_tokens(samples[:1], GenerationOptions(), 512) == 19
    assert texts_max_tokens(samples, GenerationOptions(max_tokens=400), 512) == 400


def test_a_length_that_was_asked_for_is_never_cut() -> None:
    samples = [Sample((1,), (2,), ""), Sample((1,) * 113, (2,), "")]
    with pytest.raises(BadRequest, match=r"'max_tokens' is 400, but the prompt of line 2 .* 399"):
        texts_max_tokens(samples, GenerationOptions(max_tokens=400), 512)
