"""A store and an engine without a device, whose calibrations find what a test says."""

from pathlib import Path

import pytest

from server.calibration import boundaries, jobs
from tests.api.fake_engine import FakeEngine
from tests.api.tokenizers import byte_tokenizer


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fathom.db'}"


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
