"""What an engine holds in memory before its model: counted in imports, not in bytes.

A library that serving does not need costs every server its megabytes and its part of the start.
Each test runs a Python of its own, since this one has imported everything already.
"""

import json
import subprocess
import sys

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


def imported_by(code: str) -> set[str]:
    """Those of `UNNEEDED` that a fresh process holds once it has run `code`."""
    report = (
        f"import json, sys; print(json.dumps([n for n in {sorted(UNNEEDED)} if n in sys.modules]))"
    )
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
