"""Keys over HTTP: made, listed and revoked; what a key may use; what it may use a minute."""

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, RateLimitError

from server.access import key_file
from server.access.key import Grant, NewKey
from server.access.rate_limits import UNSTATED_TOKENS
from server.api.app import create_app
from server.config import Settings
from server.errors import QueueFull
from tests.api.conftest import ADMIN_KEY, MakeClient
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}

Holder = Callable[..., httpx.AsyncClient]
"""A client with a new key of the keys file, whose limits are given."""


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": []}')
    return path


@pytest.fixture
def holder(make_client: MakeClient, engine: FakeEngine, keys_file: Path) -> Holder:
    def make(**limits: Any) -> httpx.AsyncClient:
        _, text = key_file.add(keys_file, NewKey(name="ada", grant=Grant(**limits)))
        settings = Settings(keys_file=keys_file, admin_key=ADMIN_KEY)
        return make_client(engine, settings, authorization=f"Bearer {text}")

    return make


@pytest.fixture
async def admin(
    engine: FakeEngine, keys_file: Path, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """Whoever holds the admin key, of a server with a database."""
    database = f"sqlite:///{tmp_path / 'fathom.db'}"
    app = create_app(Settings(admin_key=ADMIN_KEY, database=database), engine)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://fathom",
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
        ) as client,
    ):
        yield client


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


# /admin/keys


async def test_a_key_is_made_used_listed_and_revoked(admin: httpx.AsyncClient) -> None:
    asked = {
        "name": "ada", "adapters": ["tuned", "base"], "max_depth": 4, "requests_per_minute": 9,
        "tokens_per_minute": 999,
    }  # fmt: skip
    response = await admin.post("/admin/keys", json=asked)
    assert response.status_code == 201, response.text
    assert response.headers["cache-control"] == "no-store"
    made = response.json()
    text = made.pop("key")
    assert re.fullmatch(rf"fathom-{made['id']}-[\w-]{{43}}", text)
    assert {name: made[name] for name in asked} == asked
    assert (made["scope"], made["source"], made["revoked_at"]) == ("api", "database", None)

    used = await admin.post("/v1/completions", json=BODY, headers=bearer(text))
    assert used.status_code == 200
    listed = await admin.get("/admin/keys")
    flag, only = listed.json()["keys"]
    assert (flag["id"], flag["source"], flag["scope"]) == ("admin-key", "flag", "admin")
    assert only == made
    assert text not in listed.text
    assert "scrypt" not in listed.text

    for _ in range(2):
        revoked = (await admin.delete(f"/admin/keys/{made['id']}")).json()
        assert revoked["revoked_at"] is not None
    gone = await admin.post("/v1/completions", json=BODY, headers=bearer(text))
    assert refusal(gone, 401)["code"] == "invalid_api_key"
    audit = (await admin.get("/admin/audit")).json()["entries"]
    assert [entry["action"] for entry in audit] == ["key.revoke", "key.create"]
    assert text.split("-", 2)[2] not in json.dumps(audit)


async def test_the_first_key_closes_the_api_and_the_last_does_not_open_it(
    admin: httpx.AsyncClient,
) -> None:
    del admin.headers["authorization"]
    assert (await admin.post("/v1/completions", json=BODY)).status_code == 200
    made = (await admin.post("/admin/keys", json={"name": "a"}, headers=bearer(ADMIN_KEY))).json()
    refusal(await admin.post("/v1/completions", json=BODY), 401)
    await admin.delete(f"/admin/keys/{made['id']}", headers=bearer(ADMIN_KEY))
    refusal(await admin.post("/v1/completions", json=BODY), 401)


async def test_an_admin_key_of_the_database_opens_admin_and_is_named_in_the_trail(
    admin: httpx.AsyncClient,
) -> None:
    made = (await admin.post("/admin/keys", json={"name": "root", "scope": "admin"})).json()
    as_root = bearer(made["key"])
    client = await admin.post("/admin/keys", json={"name": "client"}, headers=as_root)
    assert client.status_code == 201
    refusal(await admin.post("/v1/completions", json=BODY, headers=as_root), 401)
    (last, first) = (await admin.get("/admin/audit")).json()["entries"]
    assert last["actor"] == f"key-{made['id']}"
    assert first["actor"] == "admin"


BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "ada", "scope": "root"}, "scope"),
    ({"name": "ada", "adapters": []}, "adapters"),
    ({"name": "ada", "adapters": "tuned"}, "adapters"),
    ({"name": "ada", "max_depth": -1}, "max_depth"),
    ({"name": "ada", "max_depth": 1.5}, "max_depth"),
    ({"name": "ada", "requests_per_minute": 0}, "requests_per_minute"),
    ({"name": "ada", "tokens_per_minute": 2**63}, "tokens_per_minute"),
    ({"name": "ada", "scope": "admin", "max_depth": 1}, "scope"),
    ({"name": "ada", "key": "my-own"}, "key"),
]


async def test_a_key_that_cannot_be_is_refused_by_its_field(admin: httpx.AsyncClient) -> None:
    for body, param in BAD_KEYS:
        error = refusal(await admin.post("/admin/keys", json=body), 400)
        assert error["param"] == param, body
    assert len((await admin.get("/admin/keys")).json()["keys"]) == 1
    # Those whose form was wrong went no further than the door.
    entries = (await admin.get("/admin/audit")).json()["entries"]
    assert {(entry["action"], entry["outcome"]) for entry in entries} == {("key.create", "refused")}


async def test_only_keys_of_the_database_are_revoked_here(
    admin: httpx.AsyncClient, holder: Holder, engine: FakeEngine, keys_file: Path
) -> None:
    for id in ("0" * 16, "x", "0" * 15, "%2e%2e"):
        assert refusal(await admin.delete(f"/admin/keys/{id}"), 404)["param"] == "id"
    assert refusal(await admin.delete("/admin/keys/admin-key"), 409)["code"] == "key_elsewhere"
    client = holder()
    (id,) = key_file.read(keys_file)
    refused = refusal(await client.delete(f"/admin/keys/{id}", headers=bearer(ADMIN_KEY)), 409)
    assert "fathom keys revoke --keys-file" in refused["message"]


async def test_without_a_database_keys_are_listed_and_not_made(holder: Holder) -> None:
    client = holder()
    client.headers.update(bearer(ADMIN_KEY))
    assert len((await client.get("/admin/keys")).json()["keys"]) == 2
    made = await client.post("/admin/keys", json={"name": "ada"})
    assert refusal(made, 503)["code"] == "store_unavailable"
    assert refusal(await client.get("/admin/usage"), 503)["code"] == "store_unavailable"


async def test_a_key_of_the_api_opens_no_admin_route(holder: Holder) -> None:
    client = holder()
    for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/usage")):
        refusal(await client.request(method, path), 403)


# Models


@pytest.mark.parametrize("model", ["plain", "plain@3", "base:plain", "nobody", "base"])
async def test_a_model_that_is_not_allowed_is_refused_before_it_is_looked_for(
    holder: Holder, engine: FakeEngine, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = holder(adapters=("tun*",))

    async def select(*_: Any) -> Any:
        raise AssertionError("it was looked for")

    monkeypatch.setattr(engine, "select", select)
    for path, body in (
        ("/v1/completions", BODY),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = refusal(await client.post(path, json=body | {"model": model}), 403)
        assert (error["param"], error["code"]) == ("model", "model_not_allowed")
    assert engine.requests == []


async def test_a_key_sees_and_uses_what_it_may(holder: Holder, engine: FakeEngine) -> None:
    client = holder(adapters=("tun*",), max_depth=9)
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["tuned"]
    assert cards[0]["lora"]["allowed_max_depth"] == 9
    assert (await client.get("/v1/models/tuned")).json() == cards[0]
    for hidden in ("base", "plain", "nobody"):
        refusal(await client.get(f"/v1/models/{hidden}"), 403)
    assert (await client.post("/v1/completions", json=BODY | {"model": "tuned"})).status_code == 200
    everything = (await holder().get("/v1/models")).json()["data"]
    assert [card["id"] for card in everything] == ["base", "plain", "tuned"]
    assert refusal(await holder().get("/v1/models/nobody"), 404)


async def test_the_base_model_is_a_name_among_others(holder: Holder) -> None:
    client = holder(adapters=("base",))
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    refusal(await client.post("/v1/completions", json=BODY | {"model": "tuned"}), 403)


# Depths; `tuned` is calibrated to 7 of 12


@pytest.mark.parametrize(
    ("max_depth", "model", "depth", "status"),
    [
        (6, "tuned", 6, 200),
        (6, "tuned", 7, 403),
        (6, "tuned@6", None, 200),
        (6, "tuned@7", None, 403),
        (6, "tuned", None, 403),  # auto, which is 7
        (6, "tuned", "auto", 403),
        (7, "tuned", "auto", 200),
        (7, "tuned", None, 200),
        (7, "tuned", "full", 403),
        (11, "plain", "full", 403),  # it reaches to 10, and still is asked for whole
        (12, "tuned", "full", 200),
        (0, "tuned", 0, 200),
        (0, "base", None, 200),
        (0, "plain@full", None, 403),
        (6, "tuned", 13, 400),  # the model has no such depth
    ],
)
async def test_a_depth_above_the_key_s_is_refused_and_never_lowered(
    holder: Holder,
    engine: FakeEngine,
    max_depth: int,
    model: str,
    depth: int | str | None,
    status: int,
) -> None:
    client = holder(max_depth=max_depth)
    fields = {"model": model} | ({} if depth is None else {"lora_depth": depth})
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        response = await client.post(path, json=body | fields)
        assert response.status_code == status, response.text
        if status == 403:
            error = refusal(response, 403)
            assert (error["param"], error["code"]) == ("lora_depth", "depth_not_allowed")
            assert f"from 0 to {max_depth} " in error["message"]
    assert len(engine.requests) == (2 if status == 200 else 0)
    assert all(request.lora.depth <= max_depth for request in engine.requests)


async def test_tokens_belong_to_no_depth(holder: Holder) -> None:
    body = {"prompt": "a", "model": "tuned"}
    assert (await holder(max_depth=1).post("/tokenize", json=body)).status_code == 200


# Rates


async def test_requests_a_minute_are_counted_with_openai_s_headers(holder: Holder) -> None:
    client = holder(requests_per_minute=3)
    for left in (2, 1, 0):
        response = await client.post("/v1/completions", json=BODY)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        reset = re.fullmatch(r"([\d.]+)s", response.headers["x-ratelimit-reset-requests"])
        assert reset is not None
        assert 0 < float(reset[1]) <= 60
        assert "x-ratelimit-limit-tokens" not in response.headers
    response = await client.post("/v1/completions", json=BODY)
    error = refusal(response, 429)
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 20
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await client.get("/v1/models")).status_code == 200  # which costs nothing


async def test_a_request_counts_whatever_becomes_of_it(holder: Holder, engine: FakeEngine) -> None:
    client = holder(requests_per_minute=4)
    for body, status in ((BODY | {"x": 1}, 400), (BODY | {"model": "nobody"}, 404), (BODY, 503)):
        engine.refusal = QueueFull("full") if status == 503 else None
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == status
    assert response.headers["x-ratelimit-remaining-requests"] == "1"
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
    refusal(await client.post("/detokenize", json={"tokens": [1]}), 429)


async def test_a_body_over_the_limit_is_not_even_read(holder: Holder) -> None:
    client = holder(requests_per_minute=1)
    await client.post("/v1/completions", json=BODY)
    refusal(await client.post("/v1/completions", content=b"{"), 429)


async def test_keys_do_not_share_a_minute(
    make_client: MakeClient, engine: FakeEngine, keys_file: Path
) -> None:
    grant = Grant(requests_per_minute=1)
    texts = [key_file.add(keys_file, NewKey(name="ada", grant=grant))[1] for _ in range(2)]
    client = make_client(engine, Settings(keys_file=keys_file))
    for text in texts:
        assert (await client.post("/v1/completions", json=BODY, headers=bearer(text))).is_success
    for text in texts:
        refusal(await client.post("/v1/completions", json=BODY, headers=bearer(text)), 429)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_reserved_for_as_long_as_a_request_runs(
    holder: Holder, engine: FakeEngine, stream: bool
) -> None:
    """`hello` is 5 tokens; the answer is shorter than it might be."""
    client = holder(tokens_per_minute=10_000)
    engine.reply = lambda request, index: "ab"
    body = BODY | {"max_tokens": 100, "stream": stream}
    first = await client.post("/v1/completions", json=body)
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    # A stream begins with its first token; a whole answer, when all is given back.
    assert int(first.headers["x-ratelimit-remaining-tokens"]) in (
        range(9895, 9901) if stream else range(9993, 10_001)
    )
    second = await client.post("/v1/completions", json=body | {"max_tokens": 4})
    left = int(second.headers["x-ratelimit-remaining-tokens"])
    assert left >= 10_000 - 7 - 9, "what was not used did not come back"


async def test_a_request_over_the_tokens_left_waits_and_one_over_the_limit_is_hopeless(
    holder: Holder, engine: FakeEngine
) -> None:
    client = holder(tokens_per_minute=60)
    assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 40})).is_success
    response = await client.post("/v1/completions", json=BODY | {"max_tokens": 40})
    assert refusal(response, 429)["type"] == "tokens"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    hopeless = await client.post("/v1/completions", json=BODY | {"max_tokens": 56})
    assert refusal(hopeless, 400)["code"] == "tokens_over_limit"
    assert "retry-after" not in hopeless.headers
    four = await client.post("/v1/completions", json=BODY | {"max_tokens": 14, "n": 4})
    assert refusal(four, 400)["param"] == "max_tokens"
    assert len(engine.requests) == 1


async def test_a_chat_that_states_no_length_is_let_in(holder: Holder, engine: FakeEngine) -> None:
    client = holder(tokens_per_minute=UNSTATED_TOKENS + 100)
    engine.reply = lambda request, index: "short"
    for _ in range(2):
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    stated = CHAT | {"max_tokens": UNSTATED_TOKENS + 100}
    refusal(await client.post("/v1/chat/completions", json=stated), 400)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_stream_has_a_status(holder: Holder, stream: bool) -> None:
    client = holder(tokens_per_minute=20)
    body = BODY | {"max_tokens": 15, "stream": stream}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    refusal(await client.post("/v1/completions", json=body), 429)


async def test_the_official_client_knows_the_error(holder: Holder) -> None:
    client = holder(requests_per_minute=1)
    openai = AsyncOpenAI(
        api_key=client.headers["authorization"].removeprefix("Bearer "),
        base_url="http://fathom/v1",
        http_client=client,
        max_retries=0,
    )
    await openai.completions.create(**BODY)
    with pytest.raises(RateLimitError) as caught:
        await openai.completions.create(**BODY)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"]


async def test_a_server_without_keys_has_no_limits_to_tell(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json=BODY)
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]
