"""One application over a fake engine, and clients of it."""

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from openai import AsyncOpenAI

from server.api.app import create_app
from server.config import Settings
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer

API_KEY = "key-of-a-client"
ADMIN_KEY = "key-of-an-operator"

MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(byte_tokenizer())


@pytest.fixture
def settings() -> Settings:
    return Settings(max_n=4, max_logprobs=5, max_body_bytes=4096)


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """`make_client(engine, settings)` -> an HTTP client of the application over ASGI."""
    clients: list[httpx.AsyncClient] = []

    def make(engine: FakeEngine, settings: Settings, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(create_app(settings, engine), raise_app_exceptions=False)
        client = httpx.AsyncClient(
            transport=transport, base_url="http://fathom", headers=headers, timeout=30
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(
    make_client: MakeClient, engine: FakeEngine, settings: Settings
) -> Iterator[httpx.AsyncClient]:
    return make_client(engine, settings)


@pytest.fixture
def openai(client: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(
        api_key="none", base_url="http://fathom/v1", http_client=client, max_retries=0
    )
