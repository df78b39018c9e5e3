"""Depths in force: those of the store, of any process, and none that was made for something else."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from boundary.record import BoundaryRecord
from boundary.store.store import AdapterKey, NoSuchVersion, Store, StoreError
from server.calibration.boundaries import Boundaries
from server.engine.request import AdapterRef
from server.errors import BadRequest, Conflict
from tests.api.fake_engine import NUM_LAYERS, FakeEngine

pytestmark = pytest.mark.anyio

BASE = "sha256:base"
TUNED = AdapterKey(BASE, "sha256:tuned")
PLAIN = AdapterKey(BASE, "sha256:plain")


def pinned(depth: int, key: AdapterKey = TUNED, num_layers: int = NUM_LAYERS) -> BoundaryRecord:
    return BoundaryRecord.pinned(depth, num_layers, "why not", base=key.base, adapter=key.adapter)


@pytest.fixture
def boundaries(engine: FakeEngine, store: Store) -> Boundaries:
    return Boundaries(engine, store)


def depth_of(engine: FakeEngine, name: str) -> tuple[int, int | None] | None:
    adapter = next(adapter for adapter in engine.adapters() if adapter.name == name)
    calibrated = engine.calibrated_depth(adapter)
    return None if calibrated is None else (calibrated.depth, calibrated.version)


def adapter(engine: FakeEngine, name: str = "tuned") -> AdapterRef:
    return next(each for each in engine.adapters() if each.name == name)


async def test_what_is_active_is_in_force_and_what_another_process_decides_soon(
    engine: FakeEngine, boundaries: Boundaries, other: Store
) -> None:
    await other.pin(pinned(4), actor="ada")
    await boundaries.refresh()
    assert depth_of(engine, "tuned") == (4, 1)
    assert depth_of(engine, "plain") is None
    await other.pin(pinned(2, PLAIN), actor="ada")
    await other.pin(pinned(9), actor="ada")
    await other.activate(TUNED, 1, action="roll_back", actor="ada")
    await boundaries.refresh()
    assert (depth_of(engine, "tuned"), depth_of(engine, "plain")) == ((4, 1), (2, 1))
    await other.activate(PLAIN, None, action="deactivate", actor="ada")
    await boundaries.refresh()
    assert (depth_of(engine, "tuned"), depth_of(engine, "plain")) == ((4, 1), None)


async def test_another_base_is_none_of_our_business(
    engine: FakeEngine, boundaries: Boundaries, other: Store
) -> None:
    elsewhere = AdapterKey("sha256:another", TUNED.adapter)
    await other.pin(pinned(4), actor="ada")
    await other.pin(pinned(1, elsewhere), actor="ada")
    await boundaries.refresh()
    assert depth_of(engine, "tuned") == (4, 1)


async def test_a_record_of_another_model_is_refused_and_says_so(
    engine: FakeEngine, boundaries: Boundaries, other: Store
) -> None:
    await other.pin(pinned(4), actor="ada")
    await boundaries.refresh()
    await other.pin(pinned(6, num_layers=NUM_LAYERS + 1), actor="ada")
    await boundaries.refresh()
    assert depth_of(engine, "tuned") is None, (
        "a record that is not applied leaves the whole adapter"
    )
    assert boundaries.refusal(TUNED.adapter) == (
        f"version 2 was made for {NUM_LAYERS + 1} layers, the model has {NUM_LAYERS}"
    )
    with pytest.raises(Conflict, match="made for 13 layers"):
        await boundaries.activate(adapter(engine), 2, actor="ada", reason=None)
    await boundaries.activate(adapter(engine), 1, actor="ada", reason=None)
    assert depth_of(engine, "tuned") == (4, 1)
    assert boundaries.refusal(TUNED.adapter) is None


async def test_a_record_that_cannot_be_read_stops_no_other(
    engine: FakeEngine, boundaries: Boundaries, other: Store, store_url: str
) -> None:
    kept, _ = await other.pin(pinned(4), actor="ada")
    await other.pin(pinned(2, PLAIN), actor="ada")
    raw = create_async_engine(store_url.replace("sqlite", "sqlite+aiosqlite"))
    async with raw.begin() as connection:
        broken = json.dumps(kept.record.model_dump(mode="json") | {"schema_version": 99})
        await connection.execute(
            text("UPDATE boundaries SET record = :r WHERE id = :i"), {"r": broken, "i": kept.id}
        )
    await raw.dispose()
    await boundaries.refresh()
    assert (depth_of(engine, "tuned"), depth_of(engine, "plain")) == (None, (2, 1))
    assert "cannot be read" in (boundaries.refusal(TUNED.adapter) or "")


async def test_a_record_beside_an_adapter_begins_its_history_once(
    engine: FakeEngine, boundaries: Boundaries, store: Store
) -> None:
    engine._adapters["tuned"] = replace(adapter(engine), boundary=pinned(3))
    await boundaries.refresh()
    assert depth_of(engine, "tuned") == (3, 1)
    engine._adapters["tuned"] = replace(adapter(engine), boundary=pinned(8))
    await boundaries.refresh()
    await Boundaries(engine, store).refresh()
    assert depth_of(engine, "tuned") == (3, 1), "a file does not overrule what was decided"
    (newest, *_) = await store.audit()
    assert (newest.actor, newest.action) == ("boundary.json", "boundary.import")


async def test_activation_here_is_in_force_at_once_and_says_its_direction(
    engine: FakeEngine, boundaries: Boundaries, store: Store
) -> None:
    for depth in (2, 4, 6):
        await store.add_boundary(pinned(depth), evidence={}, actor="ada")
    told = []
    for version in (2, 1, 3, 3):
        activation = await boundaries.activate(
            adapter(engine), version, actor="admin:1", reason="as I say"
        )
        assert depth_of(engine, "tuned") == (2 * version, version)
        assert (activation.actor, activation.reason) == ("admin:1", "as I say")
        told.append(activation.action)
    assert told == ["activate", "roll_back", "activate", "activate"]
    with pytest.raises(NoSuchVersion):
        await boundaries.activate(adapter(engine), 4, actor="admin:1", reason=None)


@pytest.mark.parametrize("depth", [-1, NUM_LAYERS + 1])
async def test_a_pin_names_a_depth_of_the_model(
    engine: FakeEngine, boundaries: Boundaries, store: Store, depth: int
) -> None:
    with pytest.raises(BadRequest, match=f"0 to {NUM_LAYERS}"):
        await boundaries.pin(adapter(engine), depth, actor="ada", reason="so deep")
    assert await store.audit() == []
    kept, activation = await boundaries.pin(adapter(engine), 0, actor="ada", reason="base")
    assert (depth_of(engine, "tuned"), kept.version, activation.action) == ((0, 1), 1, "pin")


class Failing:
    """A store that cannot be reached while `is_down`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_down = False
        self.num_failures = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **named: Any) -> Any:
            if self.is_down:
                self.num_failures += 1
                raise StoreError("database: it is gone")
            return await method(*args, **named)

        return call


async def test_while_the_store_is_gone_the_last_depths_stay(
    engine: FakeEngine, store: Store, other: Store
) -> None:
    failing = Failing(store)
    boundaries = Boundaries(engine, failing)  # type: ignore[arg-type]
    await other.pin(pinned(4), actor="ada")
    stop = asyncio.Event()
    following = asyncio.create_task(boundaries.follow(stop))
    async with asyncio.timeout(30):
        while depth_of(engine, "tuned") != (4, 1):
            await asyncio.sleep(0.001)
        failing.is_down = True
        await other.pin(pinned(6), actor="ada")
        while failing.num_failures < 3:
            await asyncio.sleep(0.001)
        assert depth_of(engine, "tuned") == (4, 1)
        failing.is_down = False
        while depth_of(engine, "tuned") != (6, 2):
            await asyncio.sleep(0.001)
        stop.set()
        await following


async def test_adapters_are_gone_through_again_only_when_they_changed(
    engine: FakeEngine, boundaries: Boundaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a second is too often to look at thousands of them."""
    num_passes = 0

    class Counted(list[AdapterRef]):
        def __iter__(self) -> Iterator[AdapterRef]:
            nonlocal num_passes
            num_passes += 1
            return super().__iter__()

    kept = Counted(engine.adapters())
    monkeypatch.setattr(engine, "adapters", lambda: kept)
    for _ in range(3):
        await boundaries.refresh()
    assert num_passes == 1
    kept = Counted(kept)
    num_passes = 0
    await boundaries.refresh()
    assert num_passes == 1
