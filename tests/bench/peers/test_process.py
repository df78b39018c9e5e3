"""Process trees: paused, resumed and ended with all that they started."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.bench.peers.process import StartFailed, Tree, serving
from tests.bench.peers.who.vllm import name_it_vllm, preloads, refuse_untuned

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\\nwhile True: pass"])
child.wait()
"""


@pytest.fixture
def spinning() -> Iterator[Tree]:
    """A parent that waits for a child that spins."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = Tree(process.pid)
        yield tree
        tree.end()


def test_a_paused_tree_takes_no_processor_and_a_resumed_one_does(spinning: Tree) -> None:
    assert len(spinning.processes()) == 2
    spinning.pause()
    before = spinning.cpu_s()
    assert spinning.idle_share(0.3) == 0.0
    spinning.resume()
    spinning.idle_share(1.0)
    assert spinning.cpu_s() > before


def test_a_paused_tree_ends_whole(spinning: Tree) -> None:
    pids = [process.pid for process in spinning.processes()]
    spinning.pause()
    spinning.end()
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_ends_before_it_is_ready_gives_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    log = tmp_path / "log" / "server.log"
    with (
        pytest.raises(StartFailed, match="ended with 1: no such model"),
        serving(command, "http://127.0.0.1:9", log=log, environment={}),
    ):
        pass


def test_a_silent_server_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(StartFailed, match="not ready after 1 s"),
        serving(command, "http://127.0.0.1:9", log=tmp_path / "log", environment={}, timeout_s=1.0),
    ):
        pass


def test_vllm_is_not_measured_without_its_libraries(tmp_path: Path, spinning: Tree) -> None:
    with pytest.raises(StartFailed, match="untuned"):
        preloads(tmp_path)
    with pytest.raises(StartFailed, match="untuned"):
        refuse_untuned(spinning, (Path("libiomp5.so"), Path("libtcmalloc_minimal.so.4")))


def test_vllm_finds_its_own_name(tmp_path: Path) -> None:
    name_it_vllm(tmp_path)
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("+cpu")
