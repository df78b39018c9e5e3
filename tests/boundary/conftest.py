"""Stores on both databases: a test that takes `store_url` runs on SQLite and on PostgreSQL."""

from collections.abc import Iterator

import pytest

from tests.postgres import Postgres


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
