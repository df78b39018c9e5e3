"""Server processes that are killed and started again so often that each cannot import everything anew."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import nursery as program
from tests.live.process import BLOCK_SIZE, Site

POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Nursed:
    """A server that has said it is ready."""

    url: str
    pid: int


class Nursery:
    """Starts servers and knows how they ended; made by `opened`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def serve(self, site: Site, folder: Path, *arguments: str) -> Nursed:
        """Start one, which leaves `stdout` and `stderr` in a folder; raises RuntimeError if it ends."""
        folder.mkdir()
        out, err = folder / "stdout", folder / "stderr"
        words = ["serve", str(site.model), "--port", "0", "--device", "cpu", "--dtype", "float32"]
        words += ["--kv-cache-bytes", "8MiB", "--block-size", str(BLOCK_SIZE)]
        words += ["--log-level", "warning", *arguments]
        for name, path in site.adapters.items():
            words += ["--adapter", f"{name}={path}"]
        pid = self._ask({"arguments": words, "stdout": str(out), "stderr": str(err)})
        while "\n" not in (text := out.read_text() if out.exists() else ""):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                raise RuntimeError(f"the server did not start:\n{err.read_text()}")
            time.sleep(POLL_S)
        ready, _, url = text.splitlines()[0].partition(" ")
        assert ready == "ready", text
        return Nursed(url, pid)

    def kill(self, server: Nursed) -> None:
        """End one without a word; it is gone on return."""
        os.kill(server.pid, signal.SIGKILL)
        assert self._ask({"wait": server.pid}) == -signal.SIGKILL

    def stop(self, server: Nursed) -> int:
        """Tell one to end, as a supervisor does, and give its status."""
        os.kill(server.pid, signal.SIGTERM)
        return self._ask({"wait": server.pid})

    def _ask(self, order: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def opened(*faults: str) -> Iterator[Nursery]:
    """A nursery, and nobody of it left at the end. faults: of `nursery`, for all its servers."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FATHOM_")}
    # What is installed is tested, not what lies beside the tests; and one thread, as in `make test`.
    environ |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, program.__file__, *faults],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    ) as process:
        yield Nursery(process)  # its end of the lines is the end of all
