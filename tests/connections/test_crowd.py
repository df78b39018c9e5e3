"""Thousands of connections to one `fathom serve`, held at once by another process.

200 by default and 5,000 among the slow tests: idle, half-open and streaming ones. Beyond the bound a
client is told so in words, requests on other connections go on being answered, and afterwards every
descriptor is back. `-o log_cli=true --log-level info` shows what the server's memory was.
"""

import json
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.connections import crowd as crowd_program
from tests.connections import limited
from tests.live.process import BASE, LiveServer, Site, make_site, metric, serve

log = logging.getLogger(__name__)

TIMEOUT_S = 120
MAX_POLLS = 3000
MAX_BYTES_EACH = 32 << 10
"""Of the server's memory, for a connection."""
SPARE_BYTES = 16 << 20
"""Of the server's memory, for the requests among them."""
STREAM = json.dumps({"model": BASE, "prompt": "and so on", "max_tokens": 50, "stream": True})
OTHER: dict[str, Any] = {"model": "plain", "prompt": "other", "max_tokens": 20, "temperature": 0}
"""On an adapter of its own, so that it does not wait for all of the streams."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@contextmanager
def crowd_of(
    server: LiveServer, idle: int = 0, half_open: int = 0, streams: int = 0
) -> Iterator[tuple[Counter[str], Callable[[], Counter[str]]]]:
    """What became of them, and what ends them and says what they were told."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    words = [host, port, *map(str, (idle, half_open, streams)), STREAM]
    command = [sys.executable, crowd_program.__file__, *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None

            def end() -> Counter[str]:
                said, _ = process.communicate("\n", timeout=TIMEOUT_S * 5)
                return Counter(json.loads(said))

            yield Counter(json.loads(process.stdout.readline())), end
        finally:
            process.kill()


def wait_for(is_so: Callable[[], bool]) -> None:
    for _ in range(MAX_POLLS):
        if is_so():
            return
        time.sleep(0.02)
    raise AssertionError("never so")


def ask(http: httpx.Client) -> str:
    text: str = (
        http.post("/v1/completions", json=OTHER).raise_for_status().json()["choices"][0]["text"]
    )
    return text


def num_open(http: httpx.Client) -> int:
    return int(metric(http, "fathom_connections"))


@pytest.mark.parametrize(
    ("idle", "half_open", "streams"),
    [
        (120, 60, 20),
        pytest.param(2000, 2000, 1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_crowd_is_held_within_bounds_and_disturbs_nobody(
    site: Site, tmp_path: Path, idle: int, half_open: int, streams: int
) -> None:
    """The soft limit on files is below what is needed, and raised at the start."""
    total = idle + half_open + streams
    program = (limited.__file__, "128", "-")
    with (
        serve(
            site, tmp_path / "log", "--max-connections", str(total + 1), program=program
        ) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as late,
    ):
        process = psutil.Process(server.process.pid)
        alone = ask(http)
        with crowd_of(server, 10, 0, 10) as (_, end):  # what is made once is made now
            end()
        wait_for(lambda: num_open(http) == 1)
        num_files, num_bytes = process.num_fds(), process.memory_info().rss
        assert metric(http, "fathom_connections_max") == total + 1
        peaks = []
        for num_round in (1, 2):
            with crowd_of(server, idle, half_open, streams) as (seen, end):
                assert seen == {"idle": idle, "half_open": half_open, "streams": streams}
                wait_for(lambda: num_open(http) == total + 1)
                assert process.num_fds() >= num_files + total
                refused = late.post("/v1/completions", json=OTHER)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "too_many_connections"
                assert late.get("/health").status_code == 200
                assert [ask(http) for _ in range(3)] == [alone] * 3
                peaks.append(process.memory_info().rss - num_bytes)
                ended = end()
            assert ended["streams whole"] == streams
            assert ended["idle 200"] == idle
            assert ended["half_open 200"] == half_open
            wait_for(lambda: num_open(http) == 1)
            assert ask(http) == alone
            assert metric(http, "fathom_connections_refused_total") == num_round
        late.close()
        wait_for(lambda: process.num_fds() == num_files)
        log.info(
            "%d connections: %.1f and %.1f MB more at their most, %.1f MB afterwards",
            total,
            *(peak / 1e6 for peak in peaks),
            (process.memory_info().rss - num_bytes) / 1e6,
        )
        assert peaks[0] < total * MAX_BYTES_EACH + SPARE_BYTES
        assert peaks[1] < 1.25 * peaks[0] + SPARE_BYTES, "what one crowd left the next one uses"
    assert "Traceback" not in server.stderr, server.stderr


LOW = 200
"""Files that a server may open, of which it needs some eighty for itself."""


def test_what_is_too_much_for_a_low_limit_is_told_so(site: Site, tmp_path: Path) -> None:
    program = (limited.__file__, "64", str(LOW))
    with serve(site, tmp_path / "log", program=program) as server:
        with crowd_of(server, idle=LOW) as (seen, end):
            assert seen == {"idle": LOW // 2, "refused 503": LOW // 2}
            assert end() == {"idle 200": LOW // 2}
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http:
            wait_for(lambda: num_open(http) == 1)
            ask(http)


def test_control_without_a_bound_files_run_out_and_the_server_lives_on(
    site: Site, tmp_path: Path
) -> None:
    """Clients are cut off without a word; when files are free again everybody is served."""
    program = (limited.__file__, "unbounded", str(LOW), str(LOW))
    with serve(site, tmp_path / "log", program=program) as server:
        # The first answer imports what answers need, from files: after it, only connections want any.
        with crowd_of(server, idle=1) as (seen, end):
            assert end() == {"idle 200": 1}
        with crowd_of(server, idle=2 * LOW) as (seen, end):
            assert seen["cut off"] > LOW // 2
            assert seen["refused 503"] == 0
            assert 0 < seen["idle"] < LOW
            end()
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http:
            wait_for(lambda: num_open(http) == 1)
            ask(http)
        with crowd_of(server, idle=20) as (seen, end):
            assert end() == {"idle 200": 20}
    assert len(server.stderr.splitlines()) < 50, "the log is not flooded"
