"""The server process of a soak, and what is read of it from outside: metrics, memory, its log."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

STOP_TIMEOUT_S = 60
ADMIN_KEY = "key-of-an-operator"
API_KEY = "key-of-a-client"

Metrics = Mapping[str, list[tuple[Mapping[str, str], float]]]


@dataclass(frozen=True, slots=True)
class SoakServer:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise ProcessLookupError(self.process.pid)

    def stop(self) -> int | None:
        """Its status; None if it did not end in time."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def served(model: Path, log: Path, arguments: Mapping[str, object]) -> Iterator[SoakServer]:
    """Start a server and wait for its ready line; on the way out one that was not stopped is killed."""
    words = [str(word) for item in arguments.items() for word in item]
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0", *words]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    # What is installed is tested, not what lies beside the tests; and one thread, as in `make test`.
    environ |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environ
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready, _, url = process.stdout.readline().strip().partition(" ")
            if ready != "ready":
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            yield SoakServer(url, process, log)
        finally:
            process.kill()


def read_metrics(text: str) -> Metrics:
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(metrics: Metrics, name: str) -> float:
    """Summed over the labels. Raises KeyError for a metric that is not there."""
    return sum(value for _, value in metrics[name])


async def scrape(http: httpx.AsyncClient) -> Metrics:
    response = await http.get("/metrics")
    response.raise_for_status()
    return read_metrics(response.text)


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Its lines as JSON, and those that are none."""
    lines, others = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            others.append(line)
    return lines, others
