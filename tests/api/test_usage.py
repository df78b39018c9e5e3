"""Usage over HTTP: what each request comes to however it ends, and how it is asked for."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.key import NOBODY
from server.access.ledger import Ledger
from server.access.rate_limits import RateLimits
from server.api import metering
from server.api.app import create_app
from server.config import Settings
from server.engine.request import RequestOutput
from server.errors import GenerationError, QueueFull
from tests.api.asgi import Exchange
from tests.api.conftest import ADMIN_KEY
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello!", "max_tokens": 4}
"""6 tokens, of which the fake finds 3 in its cache, and 4 more."""
AS_ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
LIMIT_S = 60


@pytest.fixture
async def app(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[FastAPI]:
    settings = Settings(
        admin_key=ADMIN_KEY,
        database=f"sqlite:///{tmp_path / 'fathom.db'}",
        request_timeout_s=0.2,
    )
    app = create_app(settings, engine)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://fathom") as client:
        yield client


async def usage(client: httpx.AsyncClient, **asked: Any) -> dict[str, Any]:
    response = await client.get("/admin/usage", params=asked, headers=AS_ADMIN)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def total(client: httpx.AsyncClient, **asked: Any) -> tuple[int, ...]:
    """Requests, prompt, cached and completion tokens, and the aborted ones' three."""
    found = (await usage(client, **asked))["total"]
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    aborted = ("requests", "prompt_tokens", "completion_tokens")
    return (*(found[name] for name in names), *(found["aborted"][name] for name in aborted))


async def test_each_answer_is_counted_as_its_own_usage_says(client: httpx.AsyncClient) -> None:
    for fields in ({}, {"stream": True}, {"n": 3}, {"prompt": ["ab", "abcd"]}):
        await client.post("/v1/completions", json=BODY | fields)
    # whole, stream, three answers to one prompt, two prompts in one request
    assert await total(client) == (4, 6 + 6 + 6 + 6, 3 + 3 + 3 + 3, 4 + 4 + 12 + 8, 0, 0, 0)


async def test_usage_agrees_with_what_the_client_was_told(client: httpx.AsyncClient) -> None:
    told = (await client.post("/v1/completions", json=BODY | {"n": 2})).json()["usage"]
    assert (await total(client))[:4] == (
        1,
        told["prompt_tokens"],
        told["prompt_tokens_details"]["cached_tokens"],
        told["completion_tokens"],
    )


async def test_rows_are_by_key_model_and_effective_depth(client: httpx.AsyncClient) -> None:
    """`plain` reaches to 10 of 12, so that depths 10 and full are one model."""
    made = (await client.post("/admin/keys", json={"name": "a"}, headers=AS_ADMIN)).json()
    as_ada = {"authorization": f"Bearer {made['key']}"}
    for model in ("base", "plain@10", "plain@full", "plain@3", "tuned@3"):
        answer = await client.post("/v1/completions", json=BODY | {"model": model}, headers=as_ada)
        assert answer.status_code == 200
    found = await usage(client, bucket="all")
    rows = [(row["key"], row["adapter"], row["depth"], row["requests"]) for row in found["usage"]]
    assert rows == [
        (made["id"], None, 0, 1),
        (made["id"], "plain", 3, 1),
        (made["id"], "plain", 10, 2),
        (made["id"], "tuned", 3, 1),
    ]
    assert {row["base"] for row in found["usage"]} == {"base"}
    for asked, num in (
        ({"key": made["id"]}, 5),
        ({"key": "none"}, 0),
        ({"adapter": "plain"}, 3),
        ({"adapter": "base"}, 1),
        ({"adapter": "nobody"}, 0),
        ({"key": made["id"], "adapter": "tuned"}, 1),
    ):
        assert (await total(client, **asked))[0] == num, asked


async def test_whoever_needs_no_key_is_counted_as_none(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=BODY)
    (row,) = (await usage(client))["usage"]
    assert row["key"] == "none"


async def test_buckets_have_their_bounds(client: httpx.AsyncClient) -> None:
    before = datetime.now(UTC)
    await client.post("/v1/completions", json=BODY)
    for bucket, hours in (("hour", 1), ("day", 24)):
        (row,) = (await usage(client, bucket=bucket))["usage"]
        since, until = (datetime.fromisoformat(row[name]) for name in ("since", "until"))
        assert (until - since).total_seconds() == hours * 3600
        assert since <= datetime.now(UTC)
        assert before < until
        assert since.minute == since.second == 0
        if bucket == "day":
            assert since.hour == 0
        assert (await total(client, since=row["since"], until=row["until"]))[0] == 1
        assert (await total(client, since=row["until"]))[0] == 0
        assert (await total(client, until=row["since"]))[0] == 0
    (row,) = (await usage(client, bucket="all"))["usage"]
    assert (row["since"], row["until"]) == (None, None)


async def test_pages_say_whether_there_is_more(client: httpx.AsyncClient) -> None:
    for depth in range(5):
        await client.post("/v1/completions", json=BODY | {"model": f"tuned@{depth}"})
    pages = [await usage(client, limit=2, offset=offset) for offset in (0, 2, 4)]
    assert [page["has_more"] for page in pages] == [True, True, False]
    assert [row["depth"] for page in pages for row in page["usage"]] == list(range(5))
    assert {page["total"]["requests"] for page in pages} == {5}


BAD_QUERIES = [
    ("bucket=week", "bucket"),
    ("since=yesterday", "since"),
    ("since=2026-11-25T13:00:00", "since"),  # no zone
    ("since=2026-11-25T13:30:00Z", "since"),
    ("until=2026-11-25T13:00:00.5Z", "until"),
    ("until=1795000000", "until"),
    ("since=10000-01-01T00:00:00Z", "since"),
    ("limit=0", "limit"),
    ("offset=-1", "offset"),
    ("offset=x", "offset"),
    ("key=a&key=b", "key"),
    ("key=%00", "key"),
    ("adapter=%00", "adapter"),
    ("depth=3", "depth"),
]


async def test_a_question_that_is_not_understood_is_refused_by_name(
    client: httpx.AsyncClient,
) -> None:
    for query, param in BAD_QUERIES:
        response = await client.get(f"/admin/usage?{query}", headers=AS_ADMIN)
        assert response.status_code == 400, query
        assert response.json()["error"]["param"] == param


async def test_a_zone_may_be_written_as_clients_write_it(client: httpx.AsyncClient) -> None:
    for zone in ("Z", "+00:00", "%2B00:00", " 00:00"):
        query = f"since=2026-11-25T13:00:00{zone}"
        assert (await client.get(f"/admin/usage?{query}", headers=AS_ADMIN)).status_code == 200


# Requests that end early


async def test_a_client_that_leaves_is_counted_up_to_there(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.hold_after = 2
    exchange = Exchange(app, "/v1/completions", BODY | {"stream": True})
    for _ in range(2):
        await exchange.event()
    exchange.hang_up()
    await exchange.done
    assert await total(client) == (1, 6, 3, 2, 1, 6, 2)


async def test_a_client_that_leaves_with_the_last_token_has_had_it_all(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    exchange = Exchange(app, "/v1/completions", BODY | {"stream": True})
    for _ in range(4):
        await exchange.event()
    exchange.hang_up()
    await exchange.done
    assert await total(client) == (1, 6, 3, 4, 0, 0, 0)


async def test_a_request_that_takes_too_long_is_counted_as_aborted(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.hold_after = 3
    assert (await client.post("/v1/completions", json=BODY)).status_code == 504
    assert await total(client) == (1, 6, 3, 3, 1, 6, 3)


async def test_a_request_that_fails_is_counted_as_aborted(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fail_after, engine.error = 1, GenerationError("NaN")
    assert (await client.post("/v1/completions", json=BODY)).status_code == 500
    assert await total(client) == (1, 6, 3, 1, 1, 6, 1)


async def test_a_bug_in_the_middle_is_counted_too(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.hold_after = None
    engine.bug = RuntimeError("a bug")
    assert (await client.post("/v1/completions", json=BODY)).status_code == 500
    assert await total(client) == (0,) * 7  # nothing came out of the engine


async def test_what_was_refused_used_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = QueueFull("full")
    assert (await client.post("/v1/completions", json=BODY)).status_code == 503
    assert (await client.post("/v1/completions", json=BODY | {"x": 1})).status_code == 400
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
    assert await total(client) == (0,) * 7


async def test_an_aborted_request_gives_its_tokens_back(
    app: FastAPI, client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    wish = {"name": "a", "tokens_per_minute": 6000}
    made = (await client.post("/admin/keys", json=wish, headers=AS_ADMIN)).json()
    as_ada = {"authorization": f"Bearer {made['key']}"}
    engine.hold_after = 2
    answer = await client.post("/v1/completions", json=BODY | {"max_tokens": 400}, headers=as_ada)
    assert answer.status_code == 504
    assert 5992 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 6000


# Stops and stores that fail


async def test_a_stop_writes_what_ended_just_before_and_what_it_cancels(
    engine: FakeEngine, tmp_path: Path
) -> None:
    settings = Settings(admin_key=ADMIN_KEY, database=f"sqlite:///{tmp_path / 'fathom.db'}")
    for _ in range(2):
        app = create_app(settings, engine)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://f") as client:
                found = await total(client)
                if found[0]:
                    break
                await client.post("/v1/completions", json=BODY)
            engine.hold_after = 1
            exchange = Exchange(app, "/v1/completions", BODY | {"stream": True})
            await exchange.event()
            # As uvicorn does with what outlives its patience: it cancels, and does not wait.
            exchange.done.cancel()
    assert found == (2, 12, 6, 5, 1, 6, 1)


async def test_without_the_last_write_a_stop_would_lose_it(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above."""

    async def nothing(_: Ledger) -> None:
        return

    monkeypatch.setattr(Ledger, "close", nothing)
    monkeypatch.setattr(Ledger, "follow", lambda ledger, stop: nothing(ledger))
    settings = Settings(admin_key=ADMIN_KEY, database=f"sqlite:///{tmp_path / 'fathom.db'}")
    app = create_app(settings, engine)
    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://f") as client,
        app.router.lifespan_context(app),
    ):
        await client.post("/v1/completions", json=BODY)
    app = create_app(settings, engine)
    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://f") as client,
        app.router.lifespan_context(app),
    ):
        assert await total(client) == (0,) * 7


async def test_every_way_out_closes_the_account(engine: FakeEngine) -> None:
    """`num_open`, for which a stop waits, comes back to zero; an unstarted request never counts."""
    ledger = Ledger("base")
    outputs = [RequestOutput("r", num_prompt_tokens=2, num_output_tokens=n) for n in range(3)]

    async def source() -> Any:
        for output in outputs:
            yield 0, output

    async def one(num_read: int, error: type[BaseException] | None) -> None:
        requests = engine.requests[:1]
        metered = metering.metered(
            source(),
            requests,
            key=NOBODY,
            rates=RateLimits().of(NOBODY),
            ledger=ledger,
            is_stated=True,
        )
        for _ in range(num_read):
            await anext(metered)
            assert ledger.num_open == 1
        if error is not None and num_read:
            with pytest.raises(error):
                await metered.athrow(error())
        await metered.aclose()
        assert ledger.num_open == 0

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(Settings(), engine)), base_url="http://f"
    ) as client:
        await client.post("/v1/completions", json=BODY)
    for num_read in range(3):
        for error in (None, RuntimeError, asyncio.CancelledError):
            await one(num_read, error)
