"""Keys and usage of real servers: changed elsewhere and seen here, and nothing lost by a stop."""

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from boundary.store.database import Database
from server.access import key_file
from server.access.counts import Counts
from server.access.key import NewKey
from server.access.key_store import KeyStore
from server.access.usage_store import Filter, UsageStore
from tests.live.process import (
    ADMIN_KEY,
    MAX_SCRAPES,
    STOP_TIMEOUT_S,
    LiveServer,
    Site,
    metric,
    serve,
)
from tests.postgres import Postgres

LONG: dict[str, Any] = {"model": "plain@2", "prompt": "and so on", "max_tokens": 200}
SHORT = LONG | {"max_tokens": 4, "temperature": 0}
AS_ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
MAX_TRIES = 600


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'fathom.db'}"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    url = postgres.fresh_url()
    yield url
    postgres.take_back(url)


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def ask(server: LiveServer, key: str, **fields: Any) -> httpx.Response:
    url = f"{server.url}/v1/completions"
    return httpx.post(url, json=SHORT | fields, headers=bearer(key), timeout=60)


def make_key(server: LiveServer, **fields: Any) -> dict[str, Any]:
    body = {"name": "ada"} | fields
    made = httpx.post(f"{server.url}/admin/keys", json=body, headers=AS_ADMIN, timeout=60)
    assert made.status_code == 201, made.text
    told: dict[str, Any] = made.json()
    return told


def usage(server: LiveServer, **asked: str) -> dict[str, Any]:
    url = f"{server.url}/admin/usage"
    found = httpx.get(url, params={"bucket": "all"} | asked, headers=AS_ADMIN, timeout=60)
    assert found.status_code == 200, found.text
    told: dict[str, Any] = found.json()
    return told


def until(server: LiveServer, key: str, status: int) -> None:
    """Ask until this is the answer, as often as twice a second is looked."""
    for _ in range(MAX_TRIES):
        if ask(server, key).status_code == status:
            return
        time.sleep(0.05)
    pytest.fail(f"never answered {status}")


async def keep(url: str, work: Callable[[Database], Awaitable[Any]]) -> Any:
    """Another process's work in the database, which this one is."""
    database = await Database.open(url)
    try:
        return await work(database)
    finally:
        await database.close()


def total(url: str) -> Counts:
    """What the database holds."""
    return asyncio.run(keep(url, lambda database: UsageStore(database).total(Filter())))


def test_two_servers_and_a_third_process_share_keys_and_usage(
    site: Site, tmp_path: Path, database: str
) -> None:
    path = tmp_path / "keys.json"
    ada, in_file = key_file.add(path, NewKey(name="ada"))
    arguments = ["--database", database, "--admin-key", ADMIN_KEY]
    with (
        serve(site, tmp_path / "first", *arguments, "--keys-file", str(path)) as first,
        serve(site, tmp_path / "second", *arguments) as second,
    ):
        made = make_key(first, adapters=["plain"], max_depth=2, requests_per_minute=10_000)
        key = made["key"]
        assert ask(first, key).status_code == 200  # at once where it was made
        until(second, "none", 401)  # until it knows of a key, it asks for none
        for server in (first, second):
            assert ask(server, key, model="dora@2").status_code == 403
            assert ask(server, key, model="plain@full").status_code == 403
            assert ask(server, "none").status_code == 401
        models = httpx.get(f"{second.url}/v1/models", headers=bearer(key)).json()["data"]
        assert [card["id"] for card in models] == ["plain"]

        # What both counted is one sum, and no server knows of the other.
        before = usage(first, key=made["id"])["total"]["requests"]
        for server in (first, second):
            assert ask(server, key).status_code == 200
        usage(second)  # it writes what it has
        (row,) = usage(first, key=made["id"])["usage"]
        assert (row["adapter"], row["depth"]) == ("plain", 2)
        assert row["requests"] >= before + 2
        assert row["completion_tokens"] == 4 * row["requests"]

        # Revoked by a third process, it opens neither.
        async def revoke(database: Database) -> None:
            await (await KeyStore.open(database)).revoke(made["id"], "a third process")

        asyncio.run(keep(database, revoke))
        for server in (first, second):
            until(server, key, 401)

        # So with the file, which only the first has.
        assert ask(second, in_file).status_code == 401
        assert ask(first, in_file).status_code == 200
        key_file.revoke(path, ada.key.id)
        until(first, in_file, 401)
        for server in (first, second):
            for text in (key, in_file, ADMIN_KEY):
                assert text.split("-", 2)[2] not in server.stderr


@pytest.mark.slow
def test_a_stop_loses_no_usage_of_what_it_lets_finish(
    site: Site, tmp_path: Path, database: str
) -> None:
    told: list[dict[str, Any]] = []
    arguments = ["--database", database, "--admin-key", ADMIN_KEY, "--drain-timeout-s", "60"]
    with serve(site, tmp_path / "log", *arguments) as server:

        def read() -> None:
            body = LONG | {"stream": True, "stream_options": {"include_usage": True}}
            url = f"{server.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=60) as response:
                lines = [line for line in response.iter_lines() if line.startswith("data: {")]
                told.append(json.loads(lines[-1].removeprefix("data: "))["usage"])

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        with httpx.Client(base_url=server.url) as http:
            for _ in range(MAX_SCRAPES):
                if metric(http, "vllm:num_requests_running") == 3:
                    break
        told.append(ask(server, "none").json()["usage"])
        server.process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert server.process.wait(STOP_TIMEOUT_S) == 0
    assert len(told) == 4
    kept = total(database)
    assert (kept.requests, kept.aborted_requests) == (4, 0)
    assert kept.prompt_tokens == sum(each["prompt_tokens"] for each in told)
    assert kept.completion_tokens == sum(each["completion_tokens"] for each in told)


def test_a_stop_loses_no_usage_of_what_it_ends_and_of_what_ended_just_before(
    site: Site, tmp_path: Path, database: str
) -> None:
    arguments = ["--database", database, "--admin-key", ADMIN_KEY, "--drain-timeout-s", "0"]
    with serve(site, tmp_path / "log", *arguments) as server:
        # Far more than can be written before the signal is noticed, however busy the machine.
        body = LONG | {"stream": True, "max_tokens": 900, "n": 16}
        num_read = 0
        assert ask(server, "none").status_code == 200
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as cut,
        ):
            for line in cut.iter_lines():
                if not num_read:
                    server.process.send_signal(signal.SIGTERM)
                num_read += (
                    line.startswith("data: {") and "choices" in line
                )  # not the last, an error
        assert server.process.wait(STOP_TIMEOUT_S) == 0
    kept = total(database)
    assert (kept.requests, kept.aborted_requests) == (2, 1)
    assert num_read <= kept.aborted_completion_tokens < 16 * 900
    assert kept.completion_tokens == kept.aborted_completion_tokens + SHORT["max_tokens"]
