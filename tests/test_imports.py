"""What an engine holds in memory before its model: counted in imports, not in bytes.

A library that serving does not need costs every server its megabytes and its part of the start.
Each test runs a Python of its own, since this one has imported everything already.
"""

import json
import subprocess
import sys

import pytest

# Who imports each, and what for: nobody who only serves.
UNNEEDED = {
    "alembic": "the database of calibrations",
    "matplotlib": "plots",
    "openai": "the HTTP API's answers",
    "peft": "calibration, and bases that are quantized",
    "sacrebleu": "metrics of calibration",
    "server.api": "HTTP",
    "sqlalchemy": "the database of calibrations",
}

SERVE = """
from server.config import Settings
from server.loading import load_engine, with_demo
settings = with_demo(Settings(device="cpu", kv_cache_bytes=1 << 20, max_model_len=64))
engine = load_engine(settings)
assert engine.adapters()
engine.shutdown()
"""


# What torch's compiler brings, and a model's first steps with it: noted, replayed and after.
COMPILER = {"sympy", "torch._dynamo.config", "torch.distributed.tensor"}

ALONE = """
import sys
sys.modules["torchao"] = None  # as if it were not installed: transformers imports it, and it compiles
"""

ASKED = """
import asyncio
from server.bench.in_process import EngineClient
from server.bench.load import drive
from server.bench.mix import Choice
from server.bench.workload import WorkItem
from server.config import Settings
from server.loading import load_engine, with_demo
settings = with_demo(Settings(device="cpu", kv_cache_bytes=1 << 20, max_model_len=64))
engine = load_engine(settings)
choices = [Choice(None, 0), Choice(engine.adapters()[0].name, None)]
items = [WorkItem(tuple(range(3, 9)), 24, choice) for choice in choices]
result = asyncio.run(drive(EngineClient(engine), items, 2))
assert not any(timing.error for timing in result.timings), result.timings
engine.shutdown()
"""


COMMAND = """
import types
import server
server.serve = sys.modules["server.serve"] = types.SimpleNamespace(serve=lambda settings: 0)
server.generate = sys.modules["server.generate"] = types.SimpleNamespace(generate=lambda *_, **__: 0)
from server.cli import main
from server.model import waiting_compiler
try:
    main(WORDS)
except SystemExit as end:
    assert not end.code, end.code
assert waiting_compiler.is_waiting() == WAITS
"""

MEASURED = """
from server.bench import memory
from server.model import waiting_compiler
class Pool:
    def __init__(self, *_, initializer, **__):
        assert initializer is waiting_compiler.wait
        raise SystemExit
memory.ProcessPoolExecutor = Pool
memory.measure_alone(None, [], 1)
raise AssertionError("no process was started")
"""


def imported_by(code: str, names: set[str] | None = None) -> set[str]:
    """Those of `UNNEEDED`, or of `names`, that a fresh process holds once it has run `code`."""
    looked_for = sorted(UNNEEDED if names is None else names)
    report = f"import json, sys; print(json.dumps([n for n in {looked_for} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_an_engine_with_adapters_imports_nothing_that_only_others_need() -> None:
    assert imported_by(SERVE) == set()


def test_the_process_whose_memory_is_measured_imports_nothing_more() -> None:
    assert imported_by("import server.bench.memory") == set()


def test_an_import_is_seen() -> None:
    assert imported_by("import server.bench.baseline") == {"peft"}


@pytest.mark.parametrize("waits", [True, False])
def test_an_engine_that_answers_has_no_compiler_if_it_is_to_wait(waits: bool) -> None:
    wait = "from server.model import waiting_compiler\nassert waiting_compiler.wait()\n"
    found = imported_by(ALONE + (wait if waits else "") + ASKED, COMPILER)
    assert found == (set() if waits else COMPILER)


@pytest.mark.parametrize(
    ("words", "waits"),
    [(["serve"], True), (["generate", "--prompt", "x"], True), (["--version"], False)],
)
def test_commands_that_serve_make_the_compiler_wait(words: list[str], waits: bool) -> None:
    code = COMMAND.replace("WORDS", repr(words)).replace("WAITS", repr(waits))
    assert imported_by(ALONE + code, COMPILER) == set()


def test_where_memory_is_measured_the_compiler_waits_as_in_the_server() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
