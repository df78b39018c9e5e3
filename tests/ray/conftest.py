"""One fleet for the whole run; each test deploys the application as it needs it."""

from collections.abc import Iterator

import pytest

from tests.ray.fleet import Fleet, two_nodes


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with two_nodes(tmp_path_factory.mktemp("fleet")) as running:
        yield running
