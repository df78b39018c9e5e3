"""The commands from their flags to a table, a file and a status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.bench.calibration import __main__ as commands
from server.bench.calibration import sides

TINY = "2x32:vocab=100:positions=64"
SHORT = ["--prompt-len", "8", "--completion-len", "4", "--num-samples", "2", "--rank", "2"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            commands.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert list(found) == [
        "schema", "date", "command", "machine", "versions", "facts", "findings",
    ]  # fmt: skip
    assert found["schema"] == 1
    assert found["versions"]["torch"]
    assert found["machine"]["num_cores"] >= 1
    return found


def test_cost(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    status, out, err = run(
        "cost", "--shapes", TINY, "3x32:vocab=100", *SHORT, "--repeat", "2", "--json", str(path)
    )
    assert status == 0, err
    assert "over the reference of the same repeat" in out
    report = read(path)
    assert report["facts"] == {"rank": 2, "repeat": 2, "seed": 0}
    assert list(report["findings"]) == [TINY, "3x32:vocab=100"]
    for found in report["findings"].values():
        assert list(found["ratios"]) == ["sweep", "server"]
        assert len(found["ratios"]["sweep"]["each"]) == 2


def test_unequal_scores_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    true = sides.sweep
    monkeypatch.setattr(sides, "sweep", lambda *a, **k: np.add(true(*a, **k), 1e-3))
    status, out, err = run("cost", "--shapes", TINY, *SHORT, "--repeat", "1")
    assert status == 1
    assert "not timed" in out
    assert "scores differ from the reference's by more than 0.0001" in err


def test_memory(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    status, out, err = run(
        "memory", "--shape", TINY, *SHORT, "--max-tokens", "12", "99", "--json", str(path)
    )
    assert status == 0, err
    assert "layers: evaluations over" in out
    assert [found["max_tokens"] for found in read(path)["findings"]] == [12, 99]


def test_a_broken_bound_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.calibration.memory.bound_bytes", lambda *_: 1)
    status, _, _ = run("memory", "--shape", TINY, *SHORT, "--max-tokens", "12")
    assert status == 1


def test_latency(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    load = ["--streams", "2", "--prompt-len", "4-8", "--output-len", "4", "--repeat", "1"]
    job = ["--num-samples", "2", "--sample-prompt-len", "6", "--sample-completion-len", "3"]
    adapters = ["--num-adapters", "2", "--rank", "2", "--adapter", "a1", "--share", "0.5"]
    status, out, err = run(
        "latency", "--random-model", TINY, *adapters, *load, *job, "--json", str(path)
    )
    assert status == 0, err
    assert "job alone" in out
    assert "job beside streams" in out
    report = read(path)
    assert report["facts"] == {
        "prompt": "4-8", "completion": "4", "mix": "a0@full=1,a1@full=1", "seed": 0,
        "streams": 2, "model": TINY, "calibrated": "a1", "samples": 2, "share": 0.5,
        "slice": "512 tokens",
    }  # fmt: skip
    (found,) = report["findings"]["runs"]
    assert set(found["calibrating"]["by_percent"]) == {"50", "95", "99", "100"}
    assert found["job"]["is_finished"] is True


def test_a_limit_that_is_too_short_fails(run: Run) -> None:
    load = ["--streams", "2", "--prompt-len", "4", "--output-len", "4", "--repeat", "1"]
    arguments = ["--random-model", TINY, "--num-adapters", "1", "--rank", "2", *load]
    status, out, err = run("latency", *arguments, "--num-samples", "32", "--limit-s", "0.3")
    assert status == 1, err
    assert "NOT done in 0 s" in out


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["latency", "--random-model", "2x32", "--adapter", "b"], 2, "--adapter: no adapter 'b'"),
        (["cost", "--shapes", "big"], 2, "--random-model: should be"),
        (["latency", "--random-model", TINY], 2, "189 tokens together are over the model's 64"),
        (["cost", "--repeat", "0"], 2, "repeat"),
        (["latency", "--share", "0"], 2, "share"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: list[str], status: int, match: str) -> None:
    found, out, err = run(*arguments)
    assert found == status
    assert match in err + out
