"""Processes that stand for containers: started, waited for, and ended by their own ids."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.deploy.chart.container import Container

START_S = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(made: Container, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as output,
        subprocess.Popen(made.command, env=made.environ, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def status(http: httpx.Client, path: str) -> int:
    """0 where nobody listens."""
    try:
        return http.get(path).status_code
    except httpx.ConnectError:
        return 0


def wait_for(http: httpx.Client, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it is 200. Raises AssertionError with the log."""
    give_up = time.monotonic() + START_S
    while status(http, path) != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.2)
