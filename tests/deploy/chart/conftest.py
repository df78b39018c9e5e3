"""One Helm for all tests of the chart."""

from collections.abc import Iterator

import pytest

from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.settings_schema import CHART


@pytest.fixture(scope="session")
def helm() -> Iterator[Helm]:
    with Helm(CHART) as helm:
        yield helm
