"""A peer's server as a process tree of ours: started, waited for, paused between samples, ended.

Everything is done by process id. A tree is paused by SIGSTOP so that a server that spins while it is
idle takes nothing from the one that is measured; whether it spins is measured, not assumed.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.5


class StartFailed(Exception):
    """A server that ended or stayed silent before it was ready; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A process with all that it started."""

    pid: int

    def processes(self) -> list[psutil.Process]:
        """Those that live now, the root first."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """SIGSTOP to all, the root first, so that it starts nothing meanwhile."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to all."""
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor seconds used so far by those that live."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total

    def idle_share(self, seconds: float) -> float:
        """Of one processor, what the tree takes in the next `seconds` in which nobody asks."""
        before = self.cpu_s()
        time.sleep(seconds)
        return max(0.0, self.cpu_s() - before) / seconds

    def end(self) -> None:
        """SIGTERM to the root, then SIGKILL to whatever is left of the tree."""
        processes = self.processes()
        self.resume()
        if processes:
            processes[0].terminate()
        _, alive = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)

    def _signal(self, number: int) -> None:
        for process in self.processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


@contextmanager
def serving(
    command: Sequence[str],
    url: str,
    *,
    log: Path,
    environment: Mapping[str, str],
    ready_path: str = "/health",
    timeout_s: float = 900.0,
) -> Iterator[Tree]:
    """Start `command`, wait until `url` answers 200, and end the tree on the way out.

    `environment` is added to this process's own. Raises StartFailed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            cwd=log.parent,
        )
    tree = Tree(process.pid)
    try:
        _wait(lambda: _answers(url + ready_path), process, log, timeout_s)
        yield tree
    finally:
        tree.end()
        process.wait()


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(
    is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_ready():
        if process.poll() is not None:
            raise StartFailed(f"ended with {process.returncode}: {last_words(log)}")
        if time.monotonic() > deadline_s:
            raise StartFailed(f"not ready after {timeout_s:.0f} s: {last_words(log)}")
        time.sleep(_POLL_S)


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
