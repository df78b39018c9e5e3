"""One fleet for the whole run; each test deploys the application as it needs it."""

from collections.abc import Iterator

import pytest

from tests.postgres import Postgres
from tests.ray.fleet import Fleet, make_site, two_nodes


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> dict[str, str]:
    """Settings of every replica: a model and adapters on shared disk, and PostgreSQL."""
    return make_site(tmp_path_factory.mktemp("site"), postgres.fresh_url())


@pytest.fixture(scope="session")
def fleet(site: dict[str, str]) -> Iterator[Fleet]:
    with two_nodes(site) as running:
        yield running
