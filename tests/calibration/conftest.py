"""A store and an engine without a device, whose calibrations find what a test says."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from boundary.store.store import Store
from server.calibration import boundaries, jobs
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fathom.db'}"


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    opened = await Store.open(url)
    yield opened
    await opened.close()


@pytest.fixture
async def other(store: Store, url: str) -> AsyncIterator[Store]:
    """The same database as another process has it."""
    opened = await Store.open(url)
    yield opened
    await opened.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(byte_tokenizer())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what is done twice a second."""
    monkeypatch.setattr(boundaries, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "REPORT_S", 0.01)
    monkeypatch.setattr(jobs, "REAP_S", 0.01)
    monkeypatch.setattr(jobs, "WATCH_S", 0.001)
