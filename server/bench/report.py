"""What a benchmark found, with all that is needed to judge and to repeat it: a table and JSON."""

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from server import __version__
from server.bench.check import CheckResult
from server.bench.measure import Measurement, Percentiles, Ratio, typical
from server.bench.memory import Memory

SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark. `runs` begin with the engine; the order of its keys is the order of the sides."""

    command: Sequence[str]
    model: Mapping[str, Any]
    workload: Mapping[str, Any]
    method: Mapping[str, Any]
    runs: Mapping[str, Sequence[Measurement]]
    ratios: Sequence[Ratio]
    memory: Memory | None
    check: CheckResult | None
    errors: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        memory = self.memory and asdict(self.memory) | {"over_bytes": self.memory.over_bytes}
        check = self.check and asdict(self.check) | {"is_passed": self.check.is_passed}
        return {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(self.command),
            "machine": machine(),
            "versions": versions(),
            "model": dict(self.model),
            "workload": dict(self.workload),
            "method": dict(self.method),
            "runs": {name: [asdict(run) for run in runs] for name, runs in self.runs.items()},
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "memory": memory,
            "check": check,
            "errors": list(self.errors),
        }


def write(report: Report, path: Path) -> None:
    """One indented JSON object."""
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers depend on most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.is_file() and (found := re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text())):
        model = found[1]
    has_gpu = torch.cuda.is_available()
    load_1m, _, _ = psutil.getloadavg()
    return {
        "system": platform.platform(),
        "cpu": model,
        "num_cores": usable,
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_1m": load_1m,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
    }


def versions() -> dict[str, str]:
    """Of this project, Python and the libraries that compute."""
    found = {"fathom": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in _LIBRARIES}


def show(report: Report) -> None:
    """Tables on standard output."""
    console = Console(highlight=False)
    here = machine()
    weights = report.model.get("quantization", "none")
    kind = report.model["dtype"] + ("" if weights == "none" else f" over {weights} weights")
    console.print(
        f"{report.model['name']}, {kind} on {here['gpu'] or here['cpu']}"
        f" ({here['num_cores']} cores, {here['num_threads']} threads)"
    )
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    console.print(", ".join(f"{name} {value}" for name, value in report.workload.items()))
    if report.check is not None:
        console.print(str(report.check), soft_wrap=True)
    if report.runs:
        console.print(_table(report))
    for found in report.ratios:
        latency = found.latency
        console.print(
            f"{found.median:.2f} times {found.baseline}'s output tokens/s (median of"
            f" {len(found.each)}, {found.min:.2f} to {found.max:.2f}), whose median request takes"
            f" {'-' if latency is None else f'{latency:.2f}'} times as long"
        )
    if report.memory is not None:
        console.print(_memory(report.memory))
    for error in report.errors:
        console.print(f"error: {error}", markup=False)


def _table(report: Report) -> Table:
    table = Table(caption="of each side the run in the middle; latencies p50 / p95 / p99")
    table.add_column("")
    runs = {name: typical(runs) for name, runs in report.runs.items()}
    for name in runs:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Measurement], str]] = {
        "output tokens/s": lambda run: f"{run.output_tokens_per_s:.1f}",
        "requests/s": lambda run: f"{run.requests_per_s:.2f}",
        "time to first token, ms": lambda run: _cell(run.time_to_first_token_s, 1000),
        "between tokens, ms": lambda run: _cell(run.inter_token_s, 1000),
        "whole request, s": lambda run: _cell(run.latency_s, 1),
        "steps": lambda run: _count(run.num_steps),
        "preemptions": lambda run: _count(run.num_preemptions),
        "cached prompt tokens": lambda run: str(run.num_cached_tokens),
        "failed requests": lambda run: str(run.num_failed),
    }
    for title, cell in rows.items():
        table.add_row(title, *(cell(run) for run in runs.values()))
    return table


def _memory(memory: Memory) -> str:
    over = memory.over_bytes
    text = (
        f"peak memory {decimal(memory.peak_bytes)} {memory.where}: weights"
        f" {decimal(memory.weight_bytes)}, KV cache {decimal(memory.kv_cache_bytes)}, over them"
        f" {'-' if over < 0 else ''}{decimal(abs(over))}"
    )
    if memory.start_bytes is None:
        return text
    return f"{text}, of which {decimal(memory.start_bytes)} before the model was loaded"


def _cell(found: Percentiles, factor: int) -> str:
    values = (found.p50, found.p95, found.p99)
    return " / ".join("-" if value is None else _number(value * factor) for value in values)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)
