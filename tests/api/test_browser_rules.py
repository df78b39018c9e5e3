"""What browsers are told: nothing framed, guessed or kept, and which other origins may call."""

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from server.config import Settings
from tests.api.conftest import MakeClient
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 3}
OURS, THEIRS = "https://app.example", "https://evil.example"


async def answers(client: httpx.AsyncClient, engine: FakeEngine) -> list[httpx.Response]:
    """One of every kind: an answer, a stream, errors of the routes, the framework and a bug."""
    got = [
        await client.post("/v1/completions", json=BODY),
        await client.post("/v1/completions", json=BODY | {"stream": True}),
        await client.post("/v1/completions", json={}),
        await client.post("/v1/completions", json=BODY, headers={"x-request-id": "a b"}),
        await client.get("/nowhere"),
        await client.get("/v1/completions"),
        await client.post("/v1/load_lora_adapter", json={}),
        await client.get("/metrics"),
        await client.get("/v1/models"),
        await client.get("/openapi.json"),
    ]
    engine.bug = RuntimeError("a bug")
    got.append(await client.post("/v1/completions", json=BODY))
    assert {response.status_code for response in got} == {200, 400, 403, 404, 405, 500}
    return got


async def test_every_answer_says_what_a_browser_must_not_do(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for response in await answers(client, engine):
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-request-id"]
        assert "access-control-allow-origin" not in headers


async def test_no_other_origin_may_call_unless_it_is_named(client: httpx.AsyncClient) -> None:
    for origin in (OURS, THEIRS, "null"):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        preflight = await client.options("/v1/completions", headers=asked)
        assert preflight.status_code == 405
        answer = await client.post("/v1/completions", json=BODY, headers={"origin": origin})
        for response in (preflight, answer):
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_named_origin_may_call_and_no_other(
    make_client: MakeClient, engine: FakeEngine
) -> None:
    client = make_client(engine, Settings(cors_origin=(OURS, "http://localhost:3000")))
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    for origin, is_named in ((OURS, True), (THEIRS, False), (f"{OURS}.evil.example", False)):
        preflight = await client.options("/v1/completions", headers=asked | {"origin": origin})
        answer = await client.post("/v1/completions", json=BODY, headers={"origin": origin})
        missing = await client.get("/nowhere", headers={"origin": origin})
        assert preflight.status_code == (200 if is_named else 400)
        for response in (preflight, answer, missing):
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == (origin if is_named else None)
            assert "access-control-allow-credentials" not in response.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_any_origin_may_be_let_in(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(engine, Settings(cors_origin=("*",)))
    answer = await client.post("/v1/completions", json=BODY, headers={"origin": THEIRS})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://a b", "", 3])
def test_what_is_no_origin_is_no_setting(origin: object) -> None:
    with pytest.raises(ValidationError, match="origin"):
        Settings.model_validate({"cors_origin": [origin]})
