"""Records, activations and audit, on SQLite and on PostgreSQL."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from boundary.record import BoundaryRecord
from boundary.store import audit, database
from boundary.store.store import (
    AdapterKey,
    AuditEntry,
    NoSuchVersion,
    Store,
    StoreError,
    UnreadableRecord,
)
from boundary.store.tables import BoundaryRow
from tests.boundary.test_record import selected

pytestmark = pytest.mark.anyio

BASE = f"sha256:{'a' * 64}"
KEY = AdapterKey(BASE, f"sha256:{'b' * 64}")
ELSEWHERE = AdapterKey(BASE, f"sha256:{'c' * 64}")


def pin(depth: int = 2, key: AdapterKey = KEY) -> BoundaryRecord:
    return BoundaryRecord.pinned(depth, 4, "it rhymes", base=key.base, adapter=key.adapter)


async def actions(store: Store) -> list[str]:
    return [entry.action for entry in reversed(await store.audit())]


async def test_a_record_comes_back_as_it_went_in(store: Store, other: Store) -> None:
    evidence = {"controls": [{"kind": "top_k", "score": -0.1}], "samples": ["naïve ☃ \x00"]}
    kept = await store.add_boundary(selected(), evidence=evidence, actor="ada")
    assert (kept.version, kept.record, kept.key) == (1, selected_again(kept.record), KEY)
    assert kept.created_at.utcoffset() == timedelta(0)
    assert await other.boundary(kept.id) == kept
    assert await other.version(KEY, 1) == kept
    assert await other.history(KEY) == [kept]


def selected_again(record: BoundaryRecord) -> BoundaryRecord:
    """The record of the same selection; only the time that it was made at differs."""
    return selected().model_copy(update={"created_at": record.created_at})


async def test_what_is_not_there_is_none(store: Store) -> None:
    await store.add_boundary(pin(), evidence={}, actor="ada")
    assert await store.boundary("0" * 32) is None
    assert await store.boundary("\x00") is None
    for version in (0, -1, 2, 2**31, 2**70):
        assert await store.version(KEY, version) is None
    assert await store.version(ELSEWHERE, 1) is None
    assert await store.history(ELSEWHERE) == []
    assert await store.active(KEY) is None


async def test_versions_count_by_adapter_and_base_and_come_newest_first(store: Store) -> None:
    other_base = AdapterKey(f"sha256:{'d' * 64}", KEY.adapter)
    for key, version in ((KEY, 1), (KEY, 2), (ELSEWHERE, 1), (other_base, 1), (KEY, 3)):
        kept = await store.add_boundary(pin(key=key), evidence={}, actor="ada")
        assert kept.version == version
    assert [kept.version for kept in await store.history(KEY)] == [3, 2, 1]
    assert [kept.version for kept in await store.history(KEY, limit=2)] == [3, 2]
    assert await store.history(KEY, limit=0) == []
    with pytest.raises(ValueError, match="limit"):
        await store.history(KEY, limit=-1)


async def test_writers_at_once_get_different_versions(store: Store, other: Store) -> None:
    adding = (
        each.add_boundary(pin(), evidence={}, actor="ada") for _ in range(8) for each in (store, other)
    )  # fmt: skip
    versions = [kept.version for kept in await asyncio.gather(*adding)]
    assert sorted(versions) == list(range(1, 17))


async def test_activation_and_roll_back(store: Store, other: Store) -> None:
    for depth in (1, 3):
        await store.add_boundary(pin(depth), evidence={}, actor="ada")
    first = await store.activate(KEY, 2, action="activate", actor="ada", reason="better")
    assert (first.version, first.depth, first.action, first.reason) == (2, 3, "activate", "better")
    active = await other.active(KEY)
    assert active is not None
    assert (active.id, active.record.depth) == (first.boundary_id, 3)
    back = await other.activate(KEY, 1, action="roll_back", actor="bob")
    assert back.sequence == first.sequence + 1
    active = await store.active(KEY)
    assert active is not None
    assert active.version == 1
    assert await store.active(ELSEWHERE) is None


async def test_deactivation_goes_back_to_no_record(store: Store) -> None:
    await store.pin(pin(), actor="ada")
    gone = await store.activate(KEY, None, action="deactivate", actor="ada", reason="no")
    assert (gone.version, gone.depth, gone.boundary_id) == (None, None, None)
    assert await store.active(KEY) is None
    assert await store.active_since(0) == [gone]
    assert [kept.version for kept in await store.history(KEY)] == [1]


async def test_an_unknown_version_is_refused_and_changes_nothing(store: Store) -> None:
    _, pinned = await store.pin(pin(), actor="ada")
    await store.add_boundary(pin(key=ELSEWHERE), evidence={}, actor="ada")
    await store.add_boundary(pin(key=ELSEWHERE), evidence={}, actor="ada")
    before = await store.audit()
    for version in (2, 0, 2**70):
        with pytest.raises(NoSuchVersion, match=str(version)):
            await store.activate(KEY, version, action="activate", actor="ada")
    assert await store.active_since(0) == [pinned]
    assert await store.audit() == before


async def test_action_and_version_go_together(store: Store) -> None:
    await store.pin(pin(), actor="ada")
    with pytest.raises(ValueError, match="does not go with"):
        await store.activate(KEY, None, action="activate", actor="ada")
    with pytest.raises(ValueError, match="does not go with"):
        await store.activate(KEY, 1, action="deactivate", actor="ada")


async def test_a_pin_is_kept_and_active_for_its_own_reason(store: Store) -> None:
    kept, activation = await store.pin(pin(3), actor="ada")
    assert await store.active(KEY) == kept
    assert (activation.action, activation.depth, activation.reason) == ("pin", 3, "it rhymes")
    assert activation.boundary_id == kept.id
    with pytest.raises(ValueError, match="manual"):
        await store.pin(selected(), actor="ada")


async def test_an_import_is_taken_once_and_never_overrules(store: Store, other: Store) -> None:
    importing = (
        each.import_first(pin(), actor="file") for _ in range(4) for each in (store, other)
    )
    taken = [result for result in await asyncio.gather(*importing) if result is not None]
    ((kept, activation),) = taken
    assert (activation.action, activation.version) == ("import", 1)
    assert await store.active(KEY) == kept
    await store.activate(KEY, None, action="deactivate", actor="ada")
    assert await store.import_first(pin(), actor="file") is None
    assert await store.active(KEY) is None


async def test_a_poller_sees_the_newest_of_each_adapter_once(store: Store, other: Store) -> None:
    assert await other.active_since(0) == []
    await store.pin(pin(1), actor="ada")
    _, second = await store.pin(pin(2), actor="ada")
    _, third = await store.pin(pin(3, ELSEWHERE), actor="ada")
    assert await other.active_since(0) == [second, third]
    assert await other.active_since(second.sequence) == [third]
    assert await other.active_since(third.sequence) == []
    back = await store.activate(KEY, 1, action="roll_back", actor="ada")
    assert await other.active_since(third.sequence) == [back]
    assert [found.depth for found in await other.active_since(0)] == [3, 1]


async def hold_first_writer(
    monkeypatch: pytest.MonkeyPatch, writers: Callable[[], list[Any]], poller: Store
) -> list[Any]:
    """Two writes, the first stopped between its rows and its commit until the second has begun."""
    is_written, go_on, note = asyncio.Event(), asyncio.Event(), audit.note

    async def held(*args: Any, **named: Any) -> AuditEntry:
        entry = await note(*args, **named)
        if named["actor"] == "slow" and named["action"] == "boundary.pin":
            is_written.set()
            await go_on.wait()
        return entry

    monkeypatch.setattr(audit, "note", held)
    slow, fast = writers()
    first = asyncio.create_task(slow)
    await is_written.wait()
    second = asyncio.create_task(fast)
    for _ in range(20):  # nothing tells when the second waits; too short a time only proves less
        await asyncio.sleep(0.005)
    assert await poller.active_since(0) == []
    go_on.set()
    return await asyncio.gather(first, second, return_exceptions=True)


async def test_activations_become_visible_in_the_order_of_their_numbers(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writers() -> list[Any]:
        return [store.pin(pin(), actor="slow"), other.pin(pin(key=ELSEWHERE), actor="fast")]

    (_, slow), (_, fast) = await hold_first_writer(monkeypatch, writers, store)
    assert (slow.sequence, fast.sequence) == (1, 2)
    assert await store.active_since(slow.sequence) == [fast]


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_without_the_lock_the_second_writer_fails_rather_than_be_missed(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlocked(_: Connection) -> datetime:
        return datetime.now(UTC)

    def writers() -> list[Any]:
        return [store.pin(pin(), actor="slow"), other.pin(pin(key=ELSEWHERE), actor="fast")]

    monkeypatch.setattr(database, "_lock", unlocked)
    (_, slow), failed = await hold_first_writer(monkeypatch, writers, store)
    assert isinstance(failed, StoreError)
    assert await store.active_since(0) == [slow]


async def test_nothing_is_missed_by_a_poller_among_many_writers(store: Store, other: Store) -> None:
    keys = [AdapterKey(BASE, f"sha256:{n:064}") for n in range(12)]
    seen: dict[AdapterKey, int] = {}
    last, is_done = 0, False

    async def poll() -> None:
        nonlocal last
        while not is_done:
            for found in await store.active_since(last):
                last = found.sequence
                seen[found.key] = found.sequence
            await asyncio.sleep(0)

    polling = asyncio.create_task(poll())
    each = zip(keys * 2, [store, other, other] * 8, strict=True)
    await asyncio.gather(*(by.pin(pin(key=key), actor="ada") for key, by in each))
    is_done = True
    await polling
    for found in await store.active_since(last):
        seen[found.key] = found.sequence
    assert seen == {found.key: found.sequence for found in await other.active_since(0)}
    assert set(seen) == set(keys)


async def test_everything_is_audited_with_who_what_when_and_why(store: Store) -> None:
    kept, activation = await store.pin(pin(3), actor="ada")
    await store.activate(KEY, None, action="deactivate", actor="bob", reason="it does not rhyme")
    newest, pinned, added = await store.audit()
    assert (added.actor, added.action, added.subject) == (
        "ada",
        "boundary.add",
        f"boundary:{kept.id}",
    )
    assert (pinned.action, pinned.subject) == ("boundary.pin", f"adapter:{KEY.adapter}")
    assert added.at == pinned.at == activation.at
    assert (newest.actor, newest.action) == ("bob", "boundary.deactivate")
    assert newest.details == {
        "base": BASE,
        "version": None,
        "depth": None,
        "previous_version": 1,
        "previous_depth": 3,
        "reason": "it does not rhyme",
    }
    assert newest.at >= pinned.at


async def test_the_audit_is_read_page_by_page(store: Store) -> None:
    for number in range(5):
        entry = await store.add_audit(
            actor="ada", action="adapter.load", subject=f"name:{number}", details={"n": number}
        )
    assert (await store.audit(1)) == [entry]
    first = await store.audit(2)
    second = await store.audit(2, before=first[-1].id)
    assert [found.details["n"] for found in first + second] == [4, 3, 2, 1]


async def test_the_audit_knows_requests_and_outcomes_and_is_searched(store: Store) -> None:
    for actor, action, outcome in (
        ("admin:r-1", "adapter.load", "ok"),
        ("admin:r:2", "adapter.load", "refused"),
        ("key-7:r-1", "key.create", "failed"),
        ("system", "job.interrupted", "ok"),
    ):
        await store.add_audit(actor=actor, action=action, subject="x", outcome=outcome)
    everything = [(e.actor, e.request_id, e.outcome) for e in await store.audit()]
    assert everything == [
        ("system", None, "ok"), ("key-7", "r-1", "failed"),
        ("admin", "r:2", "refused"), ("admin", "r-1", "ok"),
    ]  # fmt: skip
    for where, num in (
        ({"action": "adapter.load"}, 2), ({"request_id": "r-1"}, 2), ({"outcome": "ok"}, 2),
        ({"actor": "admin", "outcome": "ok"}, 1), ({"actor": "nobody"}, 0),
    ):  # fmt: skip
        assert len(await store.audit(where=where)) == num, where


@pytest.mark.parametrize(
    ("evidence", "actor", "why"),
    [
        ({"loss": math.nan}, "ada", "JSON"),
        ({"text": "\ud800"}, "ada", "surrogate"),
        ({"text": b"bytes"}, "ada", "JSON"),
        ({}, "a\x00da", "NUL"),
        ({}, "\udfff", "surrogate"),
    ],
)
async def test_what_one_database_would_not_keep_both_refuse(
    store: Store, evidence: dict[str, Any], actor: str, why: str
) -> None:
    with pytest.raises(StoreError, match=why):
        await store.add_boundary(pin(), evidence=evidence, actor=actor)
    assert await store.history(KEY) == []
    assert await store.audit() == []


async def test_a_failure_in_the_middle_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = audit.note

    async def failing(*args: Any, **named: Any) -> AuditEntry:
        if named["action"] == "boundary.pin":
            raise RuntimeError("no more paper")
        return await note(*args, **named)

    monkeypatch.setattr(audit, "note", failing)
    with pytest.raises(RuntimeError, match="paper"):
        await store.pin(pin(), actor="ada")
    assert await store.history(KEY) == []
    assert await store.active_since(0) == []
    assert await store.audit() == []


async def test_a_cancelled_write_leaves_nothing_and_the_next_one_works(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, is_written = audit.note, asyncio.Event()

    async def endless(*args: Any, **named: Any) -> AuditEntry:
        await note(*args, **named)
        is_written.set()
        return await asyncio.Future()

    monkeypatch.setattr(audit, "note", endless)
    task = asyncio.create_task(store.pin(pin(), actor="ada"))
    await is_written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.setattr(audit, "note", note)
    assert await store.history(KEY) == []
    kept, _ = await store.pin(pin(), actor="ada")
    assert kept.version == 1


async def test_a_record_that_nobody_can_read_is_named(store: Store) -> None:
    kept, _ = await store.pin(pin(), actor="ada")
    async with store._database.writing() as write:
        row = await write.session.get_one(BoundaryRow, kept.id)
        row.record = {**row.record, "schema_version": 2}
    for reading in (store.boundary(kept.id), store.active(KEY), store.history(KEY)):
        with pytest.raises(UnreadableRecord, match=kept.id):
            await reading


async def test_closing_twice_is_harmless(store: Store) -> None:
    await store.close()
    await store.close()
