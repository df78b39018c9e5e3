"""Whole processes with a fault in them: what their clients see, and what their supervisor is told."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import faulty_server
from tests.live.process import BASE, STOP_TIMEOUT_S, Site, make_site, serve

LONG: dict[str, Any] = {"model": BASE, "prompt": "and so on", "max_tokens": 900, "stream": True}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "longer than 2 s"),
        pytest.param("lose-device", "illegal memory access", marks=pytest.mark.slow),
        pytest.param("die", "has stopped", marks=pytest.mark.slow),
    ],
)
def test_a_server_without_its_engine_tells_its_clients_and_ends_with_status_1(
    site: Site, tmp_path: Path, fault: str, reason: str
) -> None:
    """Also where the thread that is stuck never comes back: the process does not wait for it."""
    program = (faulty_server.__file__, fault, "20")
    with serve(
        site, tmp_path / "stderr", "--step-timeout-s", "2", program=program, status=1
    ) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert len(lines) > 5
        assert reason in lines[-1]
        assert '"code": "engine_dead"' in lines[-1]
        assert server.process.wait(STOP_TIMEOUT_S) == 1
