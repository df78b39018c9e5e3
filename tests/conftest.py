"""What tests of several folders share: a tiny model, a PostgreSQL server, and one thread."""

from collections.abc import Iterator

import pytest
import torch

from tests.postgres import postgres as postgres
from tests.tiny import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Tiny matrices only lose time on a second thread, on a busy machine most of it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
