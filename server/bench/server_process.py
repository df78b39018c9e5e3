"""A `fathom serve` of this installation as a child process on the loopback address."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.bench.memory import peak_rss_bytes
from server.config import AdapterSettings, EngineSettings, ModelSettings, Settings, flag
from server.errors import EngineDead

_STOP_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that has said it is ready."""

    url: str
    pid: int

    @property
    def peak_rss_bytes(self) -> int | None:
        """The most memory it has held so far; None where the system does not tell."""
        return peak_rss_bytes(self.pid)


@contextmanager
def server_process(settings: Settings) -> Iterator[ServerProcess]:
    """Start, wait for the ready line, and stop on the way out. Raises EngineDead if it does not start."""
    command = [sys.executable, "-m", "server", "serve", *arguments(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready, _, url = process.stdout.readline().strip().partition(" ")
            if ready != "ready":
                raise EngineDead("the server process ended before it was ready; see its log above")
            yield ServerProcess(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def arguments(settings: Settings) -> list[str]:
    """The command line that gives another process these settings."""
    assert settings.model is not None
    found = ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning"]
    for name, path in settings.adapter.items():
        found += [flag("adapter"), f"{name}={path}"]
    for section in (ModelSettings, AdapterSettings, EngineSettings):
        for name in section.model_fields:
            value = getattr(settings, name)
            if name in ("model", "adapter") or value is None:
                continue
            if isinstance(value, bool):
                found.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                found += [word for each in value for word in (flag(name), str(each))]
            else:
                found += [flag(name), str(value)]
    return [settings.model, *found]
