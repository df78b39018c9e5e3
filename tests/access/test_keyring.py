"""Whose a key is: three sources, changes that count without a restart, and work that tells nothing."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from boundary.store.store import Store
from server.access import key_file, keyring, secret
from server.access.hashed_key import HashedKey
from server.access.key import Grant, NewKey
from server.access.key_store import KeyStore
from server.access.keyring import Keyring
from server.config import ConfigError, Settings
from server.errors import QueueFull

pytestmark = pytest.mark.anyio

API, ADMIN = "key-of-a-client", "key-of-an-operator"
LIMIT_S = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each scrypt that is computed from now on."""
    done: list[int] = []
    scrypt = secret.hashlib.scrypt

    def counted(given: bytes, **how: Any) -> bytes:
        done.append(how["n"])
        return scrypt(given, **how)

    monkeypatch.setattr(secret.hashlib, "scrypt", counted)
    return done


@asynccontextmanager
async def following(ring: Keyring) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(ring.follow(stop))
    yield
    stop.set()
    await task


async def until(ring: Keyring, text: str, *, opens: bool) -> None:
    """Ask until the answer is this."""
    async with asyncio.timeout(LIMIT_S):
        while (await ring.identify(text, "api") is not None) != opens:
            await asyncio.sleep(0.01)


# Flags


async def test_the_flags_keys_are_known_by_their_scope() -> None:
    ring = Keyring(Settings(api_key=API, admin_key=ADMIN))
    api, admin = await ring.identify(API, "api"), await ring.identify(ADMIN, "api")
    assert api is not None
    assert admin is not None
    assert (api.id, api.scope, api.source) == ("api-key", "api", "flag")
    assert (admin.id, admin.scope) == ("admin-key", "admin")
    assert (ring.is_api_open, ring.has_admin) == (False, True)
    for wrong in ("", API[:-1], f"{API} ", API.upper(), ADMIN + API, "k\u00e9y", "\udcff"):
        assert await ring.identify(wrong, "api") is None


async def test_one_text_may_be_both_keys() -> None:
    ring = Keyring(Settings(api_key=API, admin_key=API))
    for scope in ("api", "admin"):
        found = await ring.identify(API, scope)  # type: ignore[arg-type]
        assert found is not None
        assert found.scope == scope


async def test_every_flag_is_compared_whatever_the_first_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = Keyring(Settings(api_key=API, admin_key=ADMIN))
    lengths: list[tuple[int, int]] = []
    compare = keyring.hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        lengths.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(keyring.hmac, "compare_digest", counted)
    for text in (API, ADMIN, "", "wrong", API + "x" * 1000):
        lengths.clear()
        await ring.identify(text, "api")
        assert lengths == [(32, 32), (32, 32)]


async def test_without_any_key_the_api_is_open_and_admin_is_off() -> None:
    ring = Keyring(Settings())
    assert (ring.is_api_open, ring.has_admin) == (True, False)
    assert Keyring(Settings(admin_key=ADMIN)).is_api_open


# The same work for every text


async def test_unknown_id_wrong_secret_revoked_and_right_take_the_same_work(
    path: Path, hashes: list[int]
) -> None:
    made, right = key_file.add(path, NewKey(name="ada"))
    _, gone = key_file.add(path, NewKey(name="bob"))
    key_file.revoke(path, secret.id_of(gone) or "")
    wrong = secret.make_text(made.key.id)
    unknown = secret.make_text("0" * 16)
    ring = Keyring(Settings(keys_file=path, api_key=API))
    counts = {}
    for text in (right, gone, wrong, unknown, "none", "", right + "x", f"fathom-{made.key.id}-"):
        hashes.clear()
        found = await ring.identify(text, "api")
        assert (found is not None) == (text == right)
        counts[text] = list(hashes)
        hashes.clear()
        assert await ring.identify(text, "api") == found
        assert hashes == [], "a text that was seen is hashed again"
    assert set(map(tuple, counts.values())) == {(1 << secret.LOG2_N,)}


async def test_the_count_would_show_a_way_out(path: Path, hashes: list[int]) -> None:
    """The control: with a flag's key alone nothing is hashed, and the count says so."""
    ring = Keyring(Settings(api_key=API))
    await ring.identify("wrong", "api")
    assert hashes == []


async def test_many_who_show_one_new_key_at_once_hash_it_once(
    path: Path, hashes: list[int]
) -> None:
    _, text = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    hashes.clear()
    found = await asyncio.gather(*(ring.identify(text, "api") for _ in range(50)))
    assert all(found)
    assert len(hashes) == 1


async def test_who_leaves_while_a_key_is_hashed_takes_nothing_from_others(
    path: Path, hashes: list[int]
) -> None:
    _, text = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    hashes.clear()
    first = asyncio.create_task(ring.identify(text, "api"))
    second = asyncio.create_task(ring.identify(text, "api"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is not None
    assert first.cancelled()
    assert len(hashes) == 1


async def test_a_flood_of_wrong_keys_is_turned_away_and_known_keys_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MAX_HASHING", 4)
    _, text = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    assert await ring.identify(text, "api") is not None
    flood = [asyncio.create_task(ring.identify(f"wrong {n}", "api")) for n in range(10)]
    await asyncio.sleep(0)
    assert await ring.identify(text, "api") is not None
    ends = await asyncio.gather(*flood, return_exceptions=True)
    assert [end for end in ends if end is not None and not isinstance(end, QueueFull)] == []
    assert sum(isinstance(end, QueueFull) for end in ends) == 6
    assert await ring.identify("wrong 9", "api") is None


async def test_only_one_hash_is_computed_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 16 MiB, and what threads have freed malloc keeps."""
    threads: list[int] = []

    def noted(text: str, hash: str) -> bool:
        threads.append(threading.get_ident())
        return False

    key_file.add(path, NewKey(name="ada"))
    monkeypatch.setattr(secret, "matches", noted)
    ring = Keyring(Settings(keys_file=path))
    await asyncio.gather(*(ring.identify(f"wrong {n}", "api") for n in range(6)))
    other = await secret.aside(threading.get_ident)
    assert len(threads) == 6
    assert set(threads) == {other}
    assert other != threading.get_ident()


async def test_wrong_keys_are_remembered_up_to_a_limit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MAX_WRONG", 3)
    _, text = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    assert await ring.identify(text, "api") is not None
    for number in range(9):
        await ring.identify(f"wrong {number}", "api")
        assert len(ring._known) <= 4
    assert any(hash is not None for hash in ring._known.values()), "the right one was forgotten"


def test_nothing_that_is_held_holds_a_key(path: Path) -> None:
    _, text = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path, api_key=API))
    asyncio.run(_asked(ring, text))
    held = repr(vars(ring))
    assert secret.id_of(text) in held  # type: ignore[operator]
    assert text.split("-", 2)[2] not in held
    assert API not in held


async def _asked(ring: Keyring, text: str) -> None:
    assert await ring.identify(text, "api") is not None


# The file


async def test_a_file_that_changes_counts_without_a_restart(path: Path) -> None:
    ada, ada_text = key_file.add(path, NewKey(name="ada", grant=Grant(max_depth=3)))
    ring = Keyring(Settings(keys_file=path))
    found = await ring.identify(ada_text, "api")
    assert found == ada.key
    async with following(ring):
        _, bob_text = key_file.add(path, NewKey(name="bob"))
        await until(ring, bob_text, opens=True)
        key_file.revoke(path, ada.key.id)
        await until(ring, ada_text, opens=False)
        assert await ring.identify(bob_text, "api") is not None


async def test_a_key_is_refused_before_the_file_is_read_again(path: Path) -> None:
    """The control of the one above: it is the reading that lets a key in."""
    key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    _, text = key_file.add(path, NewKey(name="bob"))
    assert await ring.identify(text, "api") is None
    await ring.refresh()
    assert await ring.identify(text, "api") is not None, "that it opened nothing is remembered"


@pytest.mark.parametrize("num_turns", range(4))
async def test_a_key_that_comes_while_it_is_hashed_is_not_remembered_as_wrong(
    path: Path, tmp_path: Path, num_turns: int
) -> None:
    key_file.add(path, NewKey(name="ada"))
    later = tmp_path / "later.json"
    later.write_bytes(path.read_bytes())
    _, text = key_file.add(later, NewKey(name="bob"))
    ring = Keyring(Settings(keys_file=path))
    early = asyncio.create_task(ring.identify(text, "api"))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    later.replace(path)
    await ring.refresh()
    await early
    assert await ring.identify(text, "api") is not None


async def test_a_key_whose_hash_was_replaced_is_another_key(path: Path) -> None:
    made, old = key_file.add(path, NewKey(name="ada"))
    ring = Keyring(Settings(keys_file=path))
    assert await ring.identify(old, "api") is not None
    new = secret.make_text(made.key.id)
    path.write_text(path.read_text().replace(made.hash, secret.hashed(new)))
    await ring.refresh()
    assert await ring.identify(old, "api") is None
    assert await ring.identify(new, "api") is not None


@pytest.mark.parametrize("content", [b"{", None])
async def test_a_file_that_breaks_leaves_the_keys_as_they_were(
    path: Path, content: bytes | None
) -> None:
    _, text = key_file.add(path, NewKey(name="ada"))
    good = path.read_bytes()
    ring = Keyring(Settings(keys_file=path))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with capture_logs() as logs:
        await ring.refresh()
        await ring.refresh()
        assert await ring.identify(text, "api") is not None
        path.write_bytes(good)
        await ring.refresh()
    assert [(log["log_level"], log["source"]) for log in logs] == [
        ("warning", "file"),
        ("info", "file"),
    ]


async def test_a_file_asks_for_keys_even_if_it_has_none(path: Path) -> None:
    path.write_text('{"keys": []}')
    ring = Keyring(Settings(keys_file=path))
    assert not ring.is_api_open
    assert await ring.identify("none", "api") is None
    path.unlink()
    with pytest.raises(ConfigError, match="--keys-file"):
        Keyring(Settings(keys_file=path))


async def test_an_admin_key_of_the_file_turns_admin_on_until_it_is_revoked(path: Path) -> None:
    made, text = key_file.add(path, NewKey(name="root", scope="admin"))
    ring = Keyring(Settings(keys_file=path))
    found = await ring.identify(text, "admin")
    assert found == made.key
    assert ring.has_admin
    key_file.revoke(path, made.key.id)
    await ring.refresh()
    assert not ring.has_admin
    assert await ring.identify(text, "admin") is None


# The database


async def ring_over(store: Store, **settings: Any) -> tuple[Keyring, KeyStore]:
    keys = await KeyStore.open(store.database)
    ring = Keyring(Settings(**settings))
    await ring.attach(keys)
    return ring, keys


async def test_a_key_is_made_and_revoked_in_another_process(store: Store, other: Store) -> None:
    ring, _ = await ring_over(store)
    assert ring.is_api_open
    elsewhere = await KeyStore.open(other.database)
    async with following(ring):
        made, text = await elsewhere.create(NewKey(name="ada"), "elsewhere")
        await until(ring, text, opens=True)
        assert not ring.is_api_open
        await elsewhere.revoke(made.key.id, "elsewhere")
        await until(ring, text, opens=False)
    assert not ring.is_api_open, "the last key's revocation opened the door to everybody"


async def test_nobody_waits_two_seconds_for_a_revocation() -> None:
    assert keyring.POLL_S <= 1.0  # and a read of one index; nothing here is timed


async def test_a_start_knows_the_keys_that_there_are(store: Store) -> None:
    first, keys = await ring_over(store)
    ada, ada_text = await keys.create(NewKey(name="ada"), "tester")
    _, bob_text = await keys.create(NewKey(name="bob", scope="admin"), "tester")
    await keys.revoke(ada.key.id, "tester")
    second, _ = await ring_over(store)
    assert await first.identify(bob_text, "admin") is None
    assert await second.identify(bob_text, "admin") is not None
    assert await second.identify(ada_text, "api") is None
    assert second.has_admin


async def test_a_database_that_is_gone_leaves_the_keys_as_they_were(store: Store) -> None:
    ring, keys = await ring_over(store)
    made, text = await keys.create(NewKey(name="ada"), "tester")
    await ring.refresh()
    asked = keys._database
    keys._database = None  # type: ignore[assignment]

    class Gone:
        def reading(self) -> Any:
            from boundary.store.store import StoreError

            raise StoreError("database: gone")

    keys._database = Gone()  # type: ignore[assignment]
    with capture_logs() as logs:
        await ring.refresh()
        await ring.refresh()
        assert await ring.identify(text, "api") is not None
        keys._database = asked
        await keys.revoke(made.key.id, "tester")
        await ring.refresh()
    assert await ring.identify(text, "api") is None
    assert [(log["log_level"], log["source"]) for log in logs] == [
        ("warning", "database"),
        ("info", "database"),
    ]


async def test_file_and_database_are_listed_together(store: Store, path: Path) -> None:
    in_file, _ = key_file.add(path, NewKey(name="ada"))
    ring, keys = await ring_over(store, keys_file=path, api_key=API)
    in_database, _ = await keys.create(NewKey(name="bob"), "tester")
    await ring.refresh()
    flag, *made = ring.listed()
    assert not isinstance(flag, HashedKey)
    assert flag.id == "api-key"
    assert set(made) == {in_file, in_database}
    assert ring.is_elsewhere(in_file.key.id)
    assert ring.is_elsewhere("api-key")
    assert not ring.is_elsewhere(in_database.key.id)
    assert not ring.is_elsewhere("0" * 16)
