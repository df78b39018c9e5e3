"""The small routes: models, adapters, tokens, keys, health, metrics, request ids, the OpenAPI document."""

import time
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from server import __version__
from server.api.app import create_app
from server.config import Settings
from server.engine.request import AdapterRef
from tests.api.conftest import ADMIN_KEY, API_KEY, MakeClient
from tests.api.fake_engine import CALIBRATED_S, FakeEngine
from tests.api.tokenizers import byte_tokenizer

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 4}
AS_ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
AS_CLIENT = {"authorization": f"Bearer {API_KEY}"}


@pytest.fixture
def guarded(make_client: MakeClient, engine: FakeEngine) -> httpx.AsyncClient:
    settings = Settings(api_key=SecretStr(API_KEY), admin_key=SecretStr(ADMIN_KEY))
    return make_client(engine, settings)


# Models


async def test_the_base_model_comes_first_then_each_adapter(openai: AsyncOpenAI) -> None:
    cards: list[Any] = [card async for card in await openai.models.list()]
    assert [card.id for card in cards] == ["base", "plain", "tuned"]
    base, plain, tuned = cards
    assert (base.parent, base.root, base.max_model_len, base.lora) == (
        None,
        "/models/base",
        512,
        None,
    )
    assert (tuned.parent, tuned.root, tuned.owned_by) == ("base", "/adapters/tuned", "fathom")
    assert tuned.lora == {
        "rank": 8,
        "num_layers": 12,
        "effective_max_depth": 12,
        "calibrated_depth": 7,
        "boundary_version": 3,
        "allowed_max_depth": 12,
    }
    assert plain.lora["calibrated_depth"] is None
    assert tuned.permission[0]["allow_sampling"] is True


async def test_one_model(openai: AsyncOpenAI, client: httpx.AsyncClient) -> None:
    assert (await openai.models.retrieve("tuned")).id == "tuned"
    response = await client.get("/v1/models/org/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


# Adapters at run time


async def test_an_adapter_is_loaded_used_and_unloaded(guarded: httpx.AsyncClient) -> None:
    load = {"lora_name": "new", "lora_path": "/adapters/new"}
    response = await guarded.post("/v1/load_lora_adapter", json=load, headers=AS_ADMIN)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert response.text == "Success: LoRA adapter 'new' added successfully."
    used = await guarded.post("/v1/completions", json=BODY | {"model": "new"}, headers=AS_CLIENT)
    assert used.json()["lora"]["adapter"] == "new"
    response = await guarded.post(
        "/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=AS_ADMIN
    )
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'new' removed successfully."
    gone = await guarded.post("/v1/completions", json=BODY | {"model": "new"}, headers=AS_CLIENT)
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "in_message"),
    [
        (
            "load",
            {"lora_name": "tuned", "lora_path": "/a"},
            400,
            "lora_name",
            "already been loaded",
        ),
        ("load", {"lora_name": "base", "lora_path": "/a"}, 400, "lora_name", "base model"),
        ("load", {"lora_name": "x", "lora_path": "/a/missing"}, 404, "lora_path", "/a/missing"),
        ("load", {"lora_name": "x", "lora_path": "/a/corrupt"}, 400, "lora_path", "NaN"),
        ("load", {"lora_name": "x"}, 400, "lora_path", "required"),
        ("load", {"lora_path": "/a"}, 400, "lora_name", "required"),
        ("load", {"lora_name": "", "lora_path": "/a"}, 400, "lora_name", "1 character"),
        ("load", {"lora_name": "x", "lora_path": "/a", "y": 1}, 400, "y", "unknown field"),
        ("load", {"lora_name": "x", "lora_path": "a\x00"}, 400, "lora_path", "pattern"),
        (
            "load",
            {"lora_name": "x", "lora_path": "/a", "base_model_name": "b"},
            400,
            "base_model_name",
            "not supported",
        ),
        ("unload", {"lora_name": "nobody"}, 404, "lora_name", "cannot be found"),
        ("unload", {}, 400, "lora_name", "required"),
    ],
)
async def test_bad_loads_are_answered_as_vllm_does(
    guarded: httpx.AsyncClient,
    route: str,
    body: dict[str, Any],
    status: int,
    param: str,
    in_message: str,
) -> None:
    response = await guarded.post(f"/v1/{route}_lora_adapter", json=body, headers=AS_ADMIN)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert in_message in error["message"]


async def test_load_inplace_replaces(guarded: httpx.AsyncClient, engine: FakeEngine) -> None:
    (before,) = (adapter for adapter in engine.adapters() if adapter.name == "tuned")
    body = {"lora_name": "tuned", "lora_path": "/adapters/other", "load_inplace": True}
    response = await guarded.post("/v1/load_lora_adapter", json=body, headers=AS_ADMIN)
    assert response.status_code == 200
    (after,) = (adapter for adapter in engine.adapters() if adapter.name == "tuned")
    assert after.uid != before.uid


async def test_loading_is_off_without_an_admin_key(client: httpx.AsyncClient) -> None:
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    for headers in ({}, AS_ADMIN, {"authorization": "Bearer "}):
        response = await client.post("/v1/load_lora_adapter", json=body, headers=headers)
        assert response.status_code == 403
        assert "admin" in response.json()["error"]["message"]


# Keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": API_KEY}, 401),
        ({"authorization": f"Basic {API_KEY}"}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {API_KEY}x"}, 401),
        ({"authorization": "Bearer kéy".encode()}, 401),
        (AS_ADMIN, 401),
        (AS_CLIENT, 200),
        ({"authorization": f"bearer {API_KEY}"}, 200),
    ],
)
async def test_the_api_key_opens_v1(
    guarded: httpx.AsyncClient, headers: dict[str, Any], status: int
) -> None:
    for path, body in [
        ("/v1/completions", BODY),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ]:
        response = await guarded.post(path, json=body, headers=headers)
        assert response.status_code == status, path
        if status == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/tokenizer_info"):
        assert (await guarded.get(path, headers=headers)).status_code == status


async def test_a_key_is_asked_for_before_the_body_is_read(guarded: httpx.AsyncClient) -> None:
    response = await guarded.post(
        "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 401


@pytest.mark.parametrize(("headers", "status"), [({}, 401), (AS_CLIENT, 403), (AS_ADMIN, 200)])
async def test_only_the_admin_key_loads(
    guarded: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    body = {"lora_name": "new", "lora_path": "/adapters/new"}
    response = await guarded.post("/v1/load_lora_adapter", json=body, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
async def test_probes_need_no_key(guarded: httpx.AsyncClient, path: str) -> None:
    assert (await guarded.get(path)).status_code == 200


async def test_a_client_learns_which_keys_are_asked_for(
    client: httpx.AsyncClient, guarded: httpx.AsyncClient
) -> None:
    assert (await client.get("/version")).json() == {
        "version": __version__,
        "needs_api_key": False,
        "has_admin": False,
    }
    told = (await guarded.get("/version")).json()
    assert (told["needs_api_key"], told["has_admin"]) == (True, True)


# Tokens


async def test_tokens_there_and_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"model": "tuned", "prompt": "hé", "return_token_strs": True}
    tokenized = (await client.post("/tokenize", json=body)).json()
    assert tokenized == {
        "count": 3,
        "max_model_len": 512,
        "tokens": engine.tokenizer.encode("hé"),
        "token_strs": ["h", "Ã", "©"],
    }
    text = await client.post("/detokenize", json={"tokens": tokenized["tokens"]})
    assert text.json() == {"prompt": "hé"}


async def test_a_client_is_told_of_the_tokenizer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    told = (await client.get("/tokenizer_info")).json()
    tokenizer = engine.tokenizer
    assert (told["bos_token"], told["eos_token"]) == (tokenizer.bos_token, tokenizer.eos_token)
    assert (told["chat_template"], told["model_max_length"]) == (tokenizer.chat_template, 512)


async def test_a_conversation_is_tokenized_as_chat_would(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenized = (await client.post("/tokenize", json={"messages": messages})).json()
    assert tokenized["token_strs"] is None
    await client.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    assert tuple(tokenized["tokens"]) == engine.requests[0].prompt_token_ids
    body = {"messages": messages, "add_generation_prompt": False}
    shorter = (await client.post("/tokenize", json=body)).json()
    assert shorter["count"] == tokenized["count"] - 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        (
            "/tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
            400,
            "prompt",
        ),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "x": 1}, 400, "x"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [268]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ],
)
async def test_bad_tokens(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


# Health


async def test_a_dead_engine_is_neither_healthy_nor_ready(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_alive = False
    for path in ("/health", "/ready"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"


async def test_a_draining_server_is_healthy_and_not_ready(
    engine: FakeEngine, settings: Settings
) -> None:
    app = create_app(settings, engine)
    app.state.readiness.is_draining = True
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://fathom"
    ) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503


# Metrics


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def figure(samples: Any, name: str, **labels: str) -> float:
    key = (name, frozenset(({"model_name": "base", "engine": "0"} | labels).items()))
    value: float = samples[key]
    return value


async def test_the_engine_s_figures_are_scraped(client: httpx.AsyncClient) -> None:
    began = time.time()
    samples = await scrape(client)
    for name, value in {
        "vllm:num_requests_running": 2,
        "vllm:num_requests_waiting": 3,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 22,
        "vllm:generation_tokens_total": 33,
        "vllm:num_preemptions_total": 1,
        "vllm:prefix_cache_queries_total": 20,
        "vllm:prefix_cache_hits_total": 11,
        "fathom_kv_blocks_free": 75,
        "fathom_engine_alive": 1,
    }.items():
        assert figure(samples, name) == value, name
    tuned = frozenset({("adapter", "tuned")})
    assert samples["fathom_calibrated_depth", tuned] == 7
    age_s = samples["fathom_calibration_age_seconds", tuned]
    assert began <= CALIBRATED_S + age_s <= time.time()
    assert samples["fathom_lora_layers_applied_total", tuned] == 55
    assert samples["fathom_lora_layers_skipped_total", tuned] == 66


async def test_what_clients_feel_is_observed(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        await client.post("/v1/completions", json=BODY | {"stream": stream, "n": 2})
    samples = await scrape(client)
    assert figure(samples, "vllm:time_to_first_token_seconds_count") == 2
    assert figure(samples, "vllm:inter_token_latency_seconds_count") == 6
    assert figure(samples, "vllm:e2e_request_latency_seconds_count") == 2
    assert figure(samples, "vllm:request_prompt_tokens_sum") == 10
    assert figure(samples, "vllm:request_generation_tokens_sum") == 16
    assert figure(samples, "vllm:request_success_total", finished_reason="length") == 4


async def test_aborts_are_counted_by_cause(make_client: MakeClient, engine: FakeEngine) -> None:
    client = make_client(engine, Settings(request_timeout_s=0.05))
    engine.hold_after = 1
    await client.post("/v1/completions", json=BODY)
    samples = await scrape(client)
    assert figure(samples, "fathom_requests_aborted_total", cause="timeout") == 1


async def test_a_gateway_sees_which_adapters_are_busy(
    engine: FakeEngine, settings: Settings
) -> None:
    from tests.api.asgi import Exchange

    app = create_app(settings, engine)
    engine.hold_after = 1
    exchange = Exchange(app, "/v1/completions", BODY | {"model": "tuned", "stream": True})
    await exchange.event()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://fathom"
    ) as client:
        text = (await client.get("/metrics")).text
        assert 'running_lora_adapters="tuned",waiting_lora_adapters=""' in text
        engine.released.set()
        await exchange.done
        text = (await client.get("/metrics")).text
        assert 'running_lora_adapters="",waiting_lora_adapters=""' in text


# Request ids and the document


async def test_a_request_id_is_echoed_or_made(client: httpx.AsyncClient) -> None:
    given = await client.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    first = await client.get("/health")
    second = await client.get("/health")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    refused = await client.get("/health", headers={"x-request-id": "a" * 129})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-request-id"


async def test_two_requests_may_carry_one_label(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(2):
        await client.post("/v1/completions", json=BODY, headers={"x-request-id": "same"})
    assert len({request.id for request in engine.requests}) == 2


async def test_the_openapi_document_is_whole(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert "lora_depth" in schemas["CompletionRequest"]["properties"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    references: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            references.add(node.get("$ref", ""))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)
    prefix = "#/components/schemas/"
    assert {name.removeprefix(prefix) for name in references - {""}} <= schemas.keys()


def test_two_applications_share_nothing() -> None:
    engine = FakeEngine(byte_tokenizer())
    first, second = create_app(Settings(), engine), create_app(Settings(), engine)
    assert first.state.readiness is not second.state.readiness


async def test_one_request_does_not_go_through_all_adapters(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be ten thousand. The list itself is the control: it cannot do without."""

    def adapters() -> list[AdapterRef]:
        raise AssertionError("somebody asked for all adapters")

    monkeypatch.setattr(engine, "adapters", adapters)
    for model in ("tuned", "tuned@3", "base:plain@full", "base"):
        body = {"model": model, "prompt": "ab", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    body = {"model": "nobody@2", "prompt": "ab", "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 404
    for path in ("/v1/models/tuned", "/v1/models/base"):
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/v1/models/nobody")).status_code == 404
    assert (await client.get("/v1/models")).status_code == 500
