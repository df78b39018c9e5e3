"""Work on threads that end: results, errors, and no OpenMP pool left behind."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.engine import brief_thread
from tests.parity.zoo import BY_NAME, save_model


def test_results_and_errors_come_back() -> None:
    assert brief_thread.run(lambda: threading.current_thread().name) == "fathom-brief"
    with pytest.raises(KeyError):
        brief_thread.run(lambda: {}["missing"])
    assert asyncio.run(brief_thread.run_async(lambda: 7)) == 7
    with pytest.raises(KeyError):
        asyncio.run(brief_thread.run_async(lambda: {}["missing"]))


def test_the_thread_is_gone_when_the_result_is_there() -> None:
    threads: list[threading.Thread] = []
    brief_thread.run(lambda: threads.append(threading.current_thread()))
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_cancelled_work_ends_by_itself() -> None:
    has_begun, may_end, has_ended = (threading.Event() for _ in range(3))

    def work() -> None:
        has_begun.set()
        may_end.wait(10)
        has_ended.set()

    async def cancel() -> None:
        task = asyncio.create_task(brief_thread.run_async(work))
        await asyncio.to_thread(has_begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    may_end.set()
    assert has_ended.wait(10)


HAS_POOL = """
import sys
from pathlib import Path
import torch
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.core import EngineCore

def threads():
    return {path.name for path in Path("/proc/self/task").iterdir()}

torch.set_num_threads(2)
settings = Settings(model=sys.argv[1], device="cpu", kv_cache_bytes=1 << 20)
if sys.argv[2] == "brief":
    engine = AsyncEngine.from_settings(settings)
else:
    engine = AsyncEngine(EngineCore.from_settings(settings), max_live_requests=1)
before = threads()
torch.ones(1 << 20).sum()  # in parallel: makes this thread's pool, unless there is one
print("no pool" if threads() - before else "pool")
engine.shutdown()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that Linux lists")
def test_loading_leaves_no_pool_of_threads_to_the_thread_that_asked(tmp_path: Path) -> None:
    """A second pool makes every step of the engine slower. The control loads as it should not."""
    save_model(BY_NAME["llama"], tmp_path)
    found = {}
    for way in ("brief", "here"):
        done = subprocess.run(
            [sys.executable, "-c", HAS_POOL, str(tmp_path), way],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        found[way] = done.stdout.splitlines()[-1]
    assert found == {"brief": "no pool", "here": "pool"}
