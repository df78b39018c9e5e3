"""Whatever a body holds, the answer is a success or a client's error in OpenAI's shape; never a 5xx."""

import asyncio
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.app import create_app
from server.api.schemas import ChatRequest, CompletionRequest
from server.config import Settings
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["base", "tuned", "tuned@3", "auto", "full", "json_object", "function", "user", "text"]
    )
)
WORDS = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "schema", "json_schema", "regex"]
) | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)

APP = create_app(Settings(max_n=4), FakeEngine(byte_tokenizer(responses=True), max_model_len=64))


def bodies(model: type[CompletionRequest | ChatRequest]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*model.model_fields, *model.unsupported])
    return st.dictionaries(names, VALUES, max_size=6)


def post(path: str, body: dict[str, Any]) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(APP)
        async with httpx.AsyncClient(transport=transport, base_url="http://fathom") as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


def check(path: str, body: dict[str, Any]) -> None:
    response = post(path, body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies(CompletionRequest))
def test_completions(body: dict[str, Any]) -> None:
    check("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 2} | body)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies(ChatRequest))
def test_chat(body: dict[str, Any]) -> None:
    base = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    check("/v1/chat/completions", base | body)
