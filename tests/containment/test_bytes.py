"""Whatever bytes come over a socket: no 5xx, no exception, no connection kept, the next client served.

Heads and bodies that are nearly HTTP, cut into pieces: wrong lengths, several lengths, chunks without
end, upgrades, folded and naked lines, other versions, pipelines. 150 by default, 5,000 among the slow tests.
"""

import contextlib
import logging
import re
import socket
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.containment.served import API_KEY, served
from tests.live.process import metric
from tests.tiny import Tiny

MAX_POLLS = 1000
WAIT_S = 0.02
"""For an answer that may not come: a head that does not end has half a minute."""

GET = b"GET /v1/models HTTP/1.1"
POST = b"POST /v1/completions HTTP/1.1"
METHODS = (
    b"GET",
    b"POST",
    b"PUT",
    b"DELETE",
    b"HEAD",
    b"OPTIONS",
    b"CONNECT",
    b"PRI",
    b"get",
    b"G\0T",
)
TARGETS = (
    *(
        b"/v1/models",
        b"/v1/completions",
        b"/metrics",
        b"/tokenize",
        b"/",
        b"*",
        b"//",
        b"",
        b"/%00",
    ),
    *(b"http://a/v1/models", b"a:80", b"/v1/models?a=%ff&&=", b"/\xff\xfe", b"/a b", b"/#x"),
)
VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"RTSP/1.0", b"")
LENGTHS = (b"0", b"5", b"-1", b"+5", b"5, 5", b"9" * 30)
LINES = (
    *(b"host: b", b"expect: 100-continue", b"upgrade: websocket", b"upgrade: h2c"),
    *(b"http2-settings: AA", b"sec-websocket-key: eA==", b"content-type: application/json"),
    *(b" folded", b"no colon", b": no name", b"x:" + b"y" * 9000),
    *(b"content-length: " + length for length in LENGTHS),
    *(b"transfer-encoding: " + how for how in (b"chunked", b"gzip, chunked", b"identity", b"x")),
    *(b"connection: " + how for how in (b"close", b"keep-alive", b"upgrade", b"\xff")),
)
BODIES = (
    *(b"", b"hello", b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'),
    *(b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n", b"F" * 20 + b"\r\n", b"-1\r\n"),
    *(b"0\r\nx: y\r\n\r\n", b"\r\n" * 50),
)


def either(known: tuple[bytes, ...], most: int) -> st.SearchStrategy[bytes]:
    return st.one_of(st.sampled_from(known), st.sampled_from(known), st.binary(max_size=most))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A request that is served, with some of it replaced and lines put in between."""
    first = draw(st.sampled_from((GET, POST)))
    if draw(st.integers(0, 3)) == 0:
        words = (st.sampled_from(METHODS), either(TARGETS, 20), st.sampled_from(VERSIONS))
        first = b" ".join(draw(word) for word in words)
    lines = draw(st.lists(either(LINES, 30), max_size=2))
    body = draw(either(BODIES, 200)) if draw(st.booleans()) else b""
    if body and draw(st.booleans()):
        lines.append(f"content-length: {len(body)}".encode())
    end = draw(st.sampled_from((*[b"\r\n"] * 7, b"\n", b"\r", b"")))
    key = b"authorization: Bearer " + API_KEY.encode()
    return end.join([first, b"host: a", key, *lines, b"", body])


@st.composite
def pieces(draw: st.DrawFn) -> list[bytes]:
    """One to three messages, cut at any place."""
    said = b"".join(draw(st.lists(messages(), min_size=1, max_size=3)))
    cuts = sorted(draw(st.lists(st.integers(0, len(said)), max_size=3)))
    bounds = zip([0, *cuts], [*cuts, len(said)], strict=True)
    return [said[start:stop] for start, stop in bounds]


def say(address: tuple[str, int], parts: list[bytes]) -> list[int]:
    """The statuses of what came back."""
    heard = b""
    with socket.create_connection(address) as client, contextlib.suppress(ConnectionError):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            client.sendall(part)
        client.settimeout(WAIT_S)
        with contextlib.suppress(TimeoutError):
            while part := client.recv(1 << 16):
                heard += part
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]


@pytest.mark.parametrize(
    "num_cases", [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_no_bytes_break_the_server(
    model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_cases: int
) -> None:
    statuses: Counter[int] = Counter()
    with capture_logs() as lines, served(model, tmp_path) as (url, engine):
        parsed = httpx.URL(url)
        assert parsed.port is not None
        address = (parsed.host, parsed.port)

        @settings(
            max_examples=num_cases,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(pieces())
        def send(parts: list[bytes]) -> None:
            found = say(address, parts)
            statuses.update(found)
            assert all(status < 500 for status in found), found

        send()
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {API_KEY}"}) as http:
            assert http.get("/v1/models").status_code == 200
            for _ in range(MAX_POLLS):
                if metric(http, "fathom_connections") == 1:
                    break
                time.sleep(0.02)
            assert metric(http, "fathom_connections") == 1
        engine.assert_invariants()
    assert [line for line in lines if line["log_level"] in ("error", "critical")] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    # The control: some of it is understood, some is not.
    assert statuses[200] > num_cases // 20, statuses
    assert statuses[400] > num_cases // 5, statuses
