"""`fathom bench` from the command line to its report: counts and structure, never how fast."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import __version__, cli
from server.bench import benchmark
from server.bench.check import CheckResult
from server.bench.measure import Measurement

TINY = ["--random-model", "2x32:vocab=100:positions=64", "--device", "cpu", "--dtype", "float32"]
LOAD = ["--num-requests", "4", "--concurrency", "4", "--prompt-len", "6-9", "--output-len", "5"]
ADAPTERS = ["--num-adapters", "2", "--rank", "4", "--mix", "base=1,a0@1=1,a1=2"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns status, stdout and stderr."""
    for key in [key for key in os.environ if key.startswith("FATHOM_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_engine_and_baselines_side_by_side(bench: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    baselines = ["--baselines", "generate,peft", "--repeat", "2", "--check"]
    status, out, err = bench(*TINY, *LOAD, *ADAPTERS, *baselines, "--json", str(path))
    assert status == 0, err
    assert "check passed against peft in float32" in out
    assert "times generate's output tokens/s (median of 2" in out
    assert "times peft's output tokens/s (median of 2" in out

    report = read(path)
    assert list(report) == [
        "schema", "date", "command", "machine", "versions", "model", "workload", "method",
        "runs", "ratios", "memory", "check", "errors",
    ]  # fmt: skip
    assert report["schema"] == 1
    assert set(report["versions"]) == {"fathom", "python", "torch", "transformers", "peft"}
    assert report["versions"]["fathom"] == __version__
    assert report["machine"]["num_cores"] >= 1
    assert report["workload"]["seed"] == 0
    assert report["workload"]["mix"] == "base=1,a0@1=1,a1@full=2"
    assert report["errors"] == []

    assert list(report["runs"]) == ["fathom", "generate", "peft"]
    for runs in report["runs"].values():
        assert len(runs) == 2
        for run in runs:
            assert set(run) == set(Measurement.__dataclass_fields__)
            assert (run["num_requests"], run["num_failed"]) == (4, 0)
            assert run["num_output_tokens"] == 4 * 5
            assert run["latency_s"]["p50"] > 0
    for run in report["runs"]["fathom"]:
        assert run["num_steps"] >= 5
        assert run["num_preemptions"] == 0
        assert run["num_cached_tokens"] == 0
        assert run["layers_applied"] > 0
        assert run["layers_skipped"] > 0
        assert run["time_to_first_token_s"]["p50"] > 0
    first, second = report["runs"]["fathom"]
    assert first["num_prompt_tokens"] == second["num_prompt_tokens"]

    assert [ratio["baseline"] for ratio in report["ratios"]] == ["generate", "peft"]
    for ratio in report["ratios"]:
        assert len(ratio["each"]) == 2
        assert ratio["min"] <= ratio["median"] <= ratio["max"]

    check = report["check"]
    assert set(check) == {*CheckResult.__dataclass_fields__, "is_passed"}
    assert check["num_equal_tokens"] == check["num_tokens"] == 20

    memory = report["memory"]
    parts = memory["weight_bytes"] + memory["kv_cache_bytes"]
    assert memory["over_bytes"] == memory["peak_bytes"] - parts
    assert memory["peak_bytes"] >= memory["start_bytes"] > 0
    # 16 tokens a request in blocks, two layers, one head of 32, keys and values, four bytes.
    assert memory["kv_cache_bytes"] == max(1 << 16, 4 * 16 * 2 * 32 * 2 * 4)


def test_a_failed_check_ends_it_before_anything_is_timed(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(*arguments: Any) -> CheckResult:
        return CheckResult("peft", "float32", 1e-3, 2e-4, 4, 20, 3, 0.5, 0.1, 0.5)

    monkeypatch.setattr(benchmark, "check", altered)
    path = tmp_path / "report.json"
    arguments = [*TINY, *LOAD, *ADAPTERS, "--check", "--no-memory", "--json", str(path)]
    status, out, _ = bench(*arguments)
    assert status == 1
    assert "check FAILED against peft" in out
    assert read(path)["runs"] == {}
    assert read(path)["check"]["is_passed"] is False


def test_an_open_loop_of_a_trace(bench: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = ["2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:04.0319600,3180,8"]
    rows += ["2023-11-16 18:17:04.0781490,110,27", "2023-11-16 18:17:04.1206440,7433,14"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    path = tmp_path / "report.json"
    arguments = ["--trace", str(trace), "--num-requests", "4", "--rate", "100", "--repeat", "1"]
    status, out, err = bench(
        *TINY, *arguments, "--baselines", "generate", "--no-memory", "--json", str(path)
    )
    assert status == 0, err
    report = read(path)
    assert report["workload"]["loop"] == "open"
    assert report["workload"]["length scale"] == pytest.approx(64 / 7447, abs=1e-4)
    (run,) = report["runs"]["fathom"]
    assert (run["num_requests"], run["num_failed"]) == (4, 0)
    assert "length scale" in out


@pytest.mark.slow
def test_a_server_process_over_http(bench: Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    status, _, err = bench(*TINY, *LOAD, *ADAPTERS, "--http", "--repeat", "1", "--json", str(path))
    assert status == 0, err
    report = read(path)
    (run,) = report["runs"]["fathom"]
    assert (run["num_requests"], run["num_failed"], run["num_output_tokens"]) == (4, 0, 20)
    assert run["num_steps"] is None
    assert report["memory"]["where"] == "resident in the server process"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:1", "--check"], "--check: needs an engine"),
        (["--url", "http://127.0.0.1:1", "--http"], "--http: needs an engine"),
        (["--url", "http://127.0.0.1:1", "--baselines", "peft"], "--baselines: needs an engine"),
        (["--url", "http://127.0.0.1:1"], "is no Fathom server"),
        ([*TINY, "--http", "--check"], "--check: compares token ids"),
        ([*TINY, "--vocab-size", "9"], "--vocab-size"),
        ([*TINY, "--trace-scale", "0.5"], "--trace-scale"),
        ([*TINY, "--trace", "x.csv", "--prompt-len", "3"], "--prompt-len: has no effect"),
        ([*TINY, "--mix", "base=1", "--depths", "1"], "--depths: has no effect"),
        ([*TINY, "--mix", "base=1", "--mix-adapters", "1"], "--mix"),
        ([*TINY, "--mix-adapters", "1"], "--mix-adapters: 1 are more than the 0"),
        ([*TINY, "--baselines", "vllm"], "--baselines: should be of generate, peft"),
        ([*TINY, "--prompt-len", "60", "--output-len", "5"], "65 tokens together are over"),
        (["--num-adapters", "2"], "--num-adapters"),
        (["--random-model", "tiny"], "--random-model"),
    ],
)
def test_contradictions_are_refused_in_one_line(
    bench: Run, arguments: list[str], message: str
) -> None:
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert message in err
