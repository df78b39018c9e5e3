"""A page's blocks run as a reader would: one shell, one Python, one fresh directory and home.

Whatever is started lives in a process group of its own and is ended with the session.
"""

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tests.docs.page import Block

HERE = Path(__file__).parent

_PORT = re.compile(r"((?:127\.0\.0\.1|localhost):|--port[ =]|FATHOM_PORT=)(\d{2,5})\b")
_SERVER = re.compile(
    r"^(?:[^\n]*\\\n)*?[^\n]*\bserve\b[^\n]*(?:\\\n[^\n]*)*?(?<!&)&$", re.MULTILINE
)


class BlockFailed(Exception):
    """A block, or the end of a server that one started, did not go well."""


class Ports:
    """The ports that a page speaks of, as ones that are free here, so that pages may run side by side."""

    def __init__(self) -> None:
        self._chosen: dict[int, int] = {}

    def __getitem__(self, named: int) -> int:
        if named not in self._chosen:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._chosen[named] = probe.getsockname()[1]
        return self._chosen[named]

    def rewrite(self, code: str) -> str:
        return _PORT.sub(lambda match: f"{match[1]}{self[int(match[2])]}", code)


class _Interpreter:
    """A shell or a Python that runs files one after the other."""

    def __init__(self, command: list[str], folder: Path, log: Path, environ: dict[str, str]):
        orders, self._orders = os.pipe()
        self._replies, replies = os.pipe()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, str(orders), str(replies)],
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(orders, replies),
                start_new_session=True,
            )
        os.close(orders)
        os.close(replies)

    def run(self, file: Path) -> bool:
        """Whether it ran to its end; if not, the interpreter has ended."""
        with suppress(BrokenPipeError):
            os.write(self._orders, f"{file}\n".encode())
        while not select.select([self._replies], [], [], 0.5)[0]:
            if self.process.poll() is not None:
                return False
        if os.read(self._replies, 5) == b"done\n":
            return True
        self.process.wait()
        return False

    def finish(self) -> bool:
        """Let it end by itself; whether it did so well."""
        os.close(self._orders)
        self._orders = -1
        return self.process.wait() == 0

    def end(self) -> None:
        for descriptor in (self._orders, self._replies):
            if descriptor >= 0:
                os.close(descriptor)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_page(blocks: Iterable[Block], folder: Path) -> str:
    """Run a page's blocks, or what stands in for them; what they printed. Raises BlockFailed."""
    with _session(folder) as (run, output):
        for block in blocks:
            if block.not_run is None:
                run(block)
            elif block.instead is not None:
                run(replace(block, language="sh", code=block.instead + "\n"))
    return output()


@contextmanager
def _session(folder: Path) -> Iterator[tuple[Callable[[Block], None], Callable[[], str]]]:
    for name in ("work", "home", "blocks"):
        (folder / name).mkdir()
    log, ports = folder / "log", Ports()
    environment = folder / "environment"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    environ |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(folder / "home"),
        "FATHOM_PORT": str(ports[8000]),
        "OMP_NUM_THREADS": "1",
    }
    environ.pop("XDG_STATE_HOME", None)
    commands = {
        "sh": ["bash", str(HERE / "driver.sh"), str(environment)],
        "python": [sys.executable, str(HERE / "driver.py"), str(environment)],
    }
    running: dict[str, _Interpreter] = {}

    def output() -> str:
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def run(block: Block) -> None:
        code = ports.rewrite(block.code)
        if block.language == "sh":
            code = _SERVER.sub(lambda match: _awaited(match[0], ports), code)
        file = folder / "blocks" / f"{block.page.replace('/', '-')}-line-{block.line}"
        file.write_text(code, encoding="utf-8")
        if block.language not in running:
            running[block.language] = _Interpreter(
                commands[block.language], folder / "work", log, environ
            )
        if not running[block.language].run(file):
            raise BlockFailed(f"{block}: this block failed:\n\n{block.code}\n{output()[-4000:]}")

    try:
        yield run, output
        for language, interpreter in running.items():
            if not interpreter.finish():
                raise BlockFailed(f"what {language} left running ended badly:\n{output()[-4000:]}")
    finally:
        for interpreter in running.values():
            interpreter.end()


def _awaited(command: str, ports: Ports) -> str:
    """A command that puts a server in the background, and the wait until it answers."""
    port = re.search(r"--port[ =](\d+)", command)
    return f'{command}\nawait_ready "$!" {port[1] if port else ports[8000]}'
