"""What tests of several folders share: a tiny model, stores, a PostgreSQL server, and one thread.

`store` and `other` open the `store_url` of their folder.
"""

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import structlog
import torch

from boundary.store.store import Store
from server import cli
from server.logs import OURS
from tests import interpreter as interpreter
from tests.postgres import postgres as postgres
from tests.tiny import Tiny, make_tiny

Run = Callable[..., tuple[int, str, str]]
"""The command line: words and variables in; status, standard output and standard error out."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Tiny matrices only lose time on a second thread, on a busy machine most of it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def process_as_it_was() -> Iterator[None]:
    """Undo what a command does to logging and signals."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in (None, *OURS)}
    stops = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    yield
    for stop, handler in stops.items():
        signal.signal(stop, handler)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def fathom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], process_as_it_was: None
) -> Run:
    """Run the command line in this process; returns status, stdout and stderr."""
    for key in [key for key in os.environ if key.startswith("FATHOM_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
