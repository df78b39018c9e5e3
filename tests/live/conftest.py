"""One server process for the whole session, the clients that ask it, and PEFT as the oracle."""

import asyncio
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.live.asking import WAYS, Ask
from tests.live.process import (
    ADMIN_KEY,
    API_KEY,
    MAX_BODY_BYTES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    LiveServer,
    Site,
    make_site,
    serve,
)
from tests.parity.oracle import Oracle

OracleOf = Callable[[str | None], Oracle]

SERVER = pytest.StashKey[LiveServer]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what the server logged."""
    report = yield
    server = item.config.stash.get(SERVER, None)
    if report.failed and server is not None:
        report.sections.append(("stderr of the server", server.stderr[-10_000:]))
    return report


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def server(
    site: Site, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[LiveServer]:
    """Prompts are prefilled in chunks, and there are more adapters than places on the device."""
    arguments = {
        "--adapter-root": site.root,
        "--data-root": site.data,
        "--api-key": API_KEY,
        "--admin-key": ADMIN_KEY,
        "--database": f"sqlite:///{tmp_path_factory.mktemp('state') / 'fathom.db'}",
        "--max-loras": 2,
        "--max-num-seqs": MAX_NUM_SEQS,
        "--max-num-batched-tokens": MAX_NUM_BATCHED_TOKENS,
        "--max-n": MAX_N,
        "--max-logprobs": MAX_LOGPROBS,
        "--max-body-bytes": MAX_BODY_BYTES,
    }
    log = tmp_path_factory.mktemp("log") / "stderr"
    words = [str(word) for item in arguments.items() for word in item]
    with serve(site, log, *words) as server:
        pytestconfig.stash[SERVER] = server
        yield server
        assert "Traceback" not in server.stderr, server.stderr


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=API_KEY, base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def async_client(server: LiveServer, runner: asyncio.Runner) -> Iterator[AsyncOpenAI]:
    client = AsyncOpenAI(api_key=API_KEY, base_url=f"{server.url}/v1", max_retries=0)
    runner.run(client.__aenter__())
    yield client
    runner.run(client.close())


@pytest.fixture(params=WAYS)
def ask(
    request: pytest.FixtureRequest,
    client: OpenAI,
    async_client: AsyncOpenAI,
    runner: asyncio.Runner,
) -> Ask:
    """The official client, in each of four ways."""
    return Ask(request.param, client, async_client, runner)


@pytest.fixture(scope="session")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    """For what the official client would not send. Carries the client's key."""
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def admin(server: LiveServer) -> Iterator[httpx.Client]:
    """Whoever holds the admin key."""
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def oracle_of(site: Site) -> OracleOf:
    """PEFT's answer for an adapter's name, or for the base model's None."""

    @cache
    def oracle(adapter: str | None) -> Oracle:
        return Oracle(site.model, None if adapter is None else site.adapters[adapter])

    return partial(oracle)
