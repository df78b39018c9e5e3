"""Stores on both databases: a test that takes `store_url` runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from boundary.store import Store


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that nobody has used."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fathom.db'}"
    url: str = request.getfixturevalue("postgres").fresh_url()
    return url


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
