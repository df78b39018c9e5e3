"""One model with two adapters for all of this folder."""

import pytest

from tests.containment.served import make_model
from tests.tiny import Tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_model(tmp_path_factory.mktemp("model"))
