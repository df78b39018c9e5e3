"""A server's full collections look at what it made since it was loaded; a control without that.

What is left out is looked at again at the end of the process.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.zoo import BY_NAME, save_model

CODE = """
import gc, sys
from server import serve
from server.config import Settings

def count(self, sockets):
    print(len(gc.get_objects()))

serve.AnnouncingServer.run = count
if sys.argv[1] == "all":
    serve.leave_out_what_is_there = lambda: None
serve.serve(Settings(model=sys.argv[2], device="cpu", kv_cache_bytes=32 << 20, port=0))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BY_NAME["llama"], tmp_path_factory.mktemp("garbage"))


@pytest.mark.parametrize(("looks_at", "is_few"), [("new", True), ("all", False)])
def test_a_loaded_server_is_not_looked_through_again(
    model: Path, looks_at: str, is_few: bool
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE, looks_at, str(model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout, ran.stderr
    assert (int(ran.stdout.split()[-1]) < 20_000) == is_few


AT_THE_END = """
import atexit, gc
from server.garbage import leave_out_what_is_there

atexit.register(lambda: print(gc.get_freeze_count()))  # called after what is registered later
leave_out_what_is_there()
print(gc.get_freeze_count())
"""


def test_a_process_that_ends_looks_at_all() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=True
    )
    frozen, frozen_at_the_end = map(int, ran.stdout.split())
    assert frozen > frozen_at_the_end == 0
