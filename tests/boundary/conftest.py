"""Stores on both databases: a test that takes `store_url` runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator, Iterator

import pytest

from boundary.store.store import Store
from tests.postgres import Postgres


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def empty_database(request: pytest.FixtureRequest, kind: str) -> Iterator[str]:
    """The URL of a database that nobody has used."""
    if kind == "sqlite":
        yield f"sqlite:///{request.getfixturevalue('tmp_path')}/{request.fixturename}.db"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    url = postgres.fresh_url()
    yield url
    postgres.take_back(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from empty_database(request, request.param)


@pytest.fixture
def second_url(request: pytest.FixtureRequest, store_url: str) -> Iterator[str]:
    """Another database of the same kind."""
    yield from empty_database(request, store_url.partition(":")[0])


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await Store.open(store_url)
    yield opened
    await opened.close()


@pytest.fixture
async def other(store: Store, store_url: str) -> AsyncIterator[Store]:
    """The same database as another process has it."""
    opened = await Store.open(store_url)
    yield opened
    await opened.close()
