"""A page whose tables come from files of findings: what lies between two marks is written anew.

<!-- table: NAME -->
...
<!-- end -->
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from server.bench.capacity import report
from server.bench.capacity.comparison import QUANTITIES, Run, by_cell, middle, run_from
from server.bench.capacity.cost import StepCosts
from server.bench.capacity.hardware import h200, lora_parameters
from server.bench.capacity.measurement import Measured
from server.bench.capacity.planning import Plan, plan_from
from server.bench.shape import NAMED
from server.config import ConfigError

_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(directory: Path) -> dict[str, Callable[[], str]]:
    """Every table by name, from the findings in a directory."""

    def found(name: str) -> Any:
        return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))["findings"]

    names = [name for name in ("costs", "costs-demo") if (directory / f"{name}.json").is_file()]
    measured = [report.measured_from(found(name)) for name in names]
    return {
        "costs": lambda: costs(measured),
        "residuals": lambda: residuals(measured),
        "comparison": lambda: comparison([run_from(one) for one in found("compare")]),
        "assumptions": assumptions,
        "plan-core": lambda: plans([plan_from(one) for one in found("plan-core")]),
        "plan-h200": lambda: plans([plan_from(one) for one in found("plan-h200")]),
        "memory": lambda: memory(measured[0]),
    }


def rewritten(text: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables made anew. Raises ConfigError for a mark that names no table."""
    marked = {name for _, name, _ in _MARKED.findall(text)}
    if marked != makers.keys():
        raise ConfigError(
            f"the page should have the tables {', '.join(sorted(makers))} (it has"
            f" {', '.join(sorted(marked)) or 'none'})"
        )
    return _MARKED.sub(lambda match: f"{match[1]}{makers[match[2]]()}\n{match[3]}", text)


def costs(measured: list[Measured]) -> str:
    """Terms by model."""
    rows = [
        [
            _TERMS[field.name],
            *(f"{1e6 * getattr(one.costs.step, field.name):,.4g}" for one in measured),
        ]
        for field in fields(StepCosts)
    ]
    seconds = {
        "an adapter from host memory into a slot": [one.costs.load.slot_s for one in measured],
        "an adapter read, its file in the system's cache, by the clock": [
            one.disk_warm_s for one in measured
        ],
        "an adapter read, its file not in the cache, by the clock": [
            one.disk_cold_s for one in measured
        ],
    }
    rows += [[title, *(f"{1e6 * one:,.4g}" for one in each)] for title, each in seconds.items()]
    return _table(["µs", *(one.model.partition(":")[0] for one in measured)], rows)


_TERMS = {
    "base": "a step",
    "decode_row": "a decoding row",
    "decode_pair": "a key that one reads",
    "prefill": "a step with prompts in it, more",
    "prefill_token": "a prompt token",
    "prefill_pair": "a query-key pair of a prompt",
    "lora_token": "a token whose LoRA applies in all layers",
    "lora_adapter": "a distinct adapter of the step, whole",
}


def residuals(measured: list[Measured]) -> str:
    """How far the costs are from steps, one row a set of steps."""
    rows = []
    for one in measured:
        for name, left in (("fitted", one.fitted), ("took no part", one.tested)):
            shares = (left.median, left.p95, left.max)
            rows.append(
                [one.model.partition(":")[0], name, f"{left.num_steps:,}"]
                + [f"{share:.1%}" for share in shares]
                + [f"{left.bias:+.1%}"]
            )
    titles = ["model", "steps that", "number", "median error", "p95", "largest", "of all time"]
    return _table(titles, rows)


def comparison(runs: list[Run]) -> str:
    """Predicted / measured and the error, one row a quantity, one column a cell; medians of rounds."""
    cells = by_cell(runs)
    titles = ["", *(f"{own[0].cell.num_adapters} adapters, {own[0].cell.load:g}" for own in cells)]
    rows = [
        ["requests/s", *(", ".join(f"{run.cell.rate:.1f}" for run in own) for own in cells)],
        ["wall's clock over the engine's", *(_each(own, "slowdown") for own in cells)],
        ["requests answered", *(str(sum(r.measured.num_answered for r in own)) for own in cells)],
    ]
    for quantity, title in QUANTITIES.items():
        row = [title]
        for own in cells:
            factor = 1000 if title.endswith("ms") else 1
            predicted, measured = (
                middle(own, side, quantity) for side in ("predicted", "measured")
            )
            error = f" ({predicted / measured - 1:+.0%})" if measured else ""
            row.append(f"{_figure(predicted * factor)} / {_figure(measured * factor)}{error}")
        rows.append(row)
    return _table(titles, rows)


def _each(runs: list[Run], name: str) -> str:
    return ", ".join(f"{getattr(run, name):.1f}" for run in runs)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def assumptions() -> str:
    """What the H200's costs stand on."""
    _, found = h200()
    return _table(
        ["", "value", "measured or assumed"], [[one.what, one.value, one.source] for one in found]
    )


def plans(found: list[Plan]) -> str:
    """One row a case."""
    return _table(list(report.PLAN_TITLES), [report.plan_row(one) for one in found])


def memory(measured: Measured) -> str:
    """Bytes of adapters, by where they are."""
    rows = []
    big = 2 * lora_parameters(NAMED["llama-3.1-8b"], 16)
    for name, size in (
        ("12x768, float32", measured.adapter_bytes),
        ("Llama 3.1 8B, bfloat16", big),
    ):
        rows.append([name, *(decimal(count * size) for count in (1, 8, 64, 128, 1024, 10_000))])
    titles = [
        "r=16 on every Linear",
        "one",
        "8 slots",
        "64 slots",
        "128 slots",
        "1,024 in host memory",
    ]
    return _table([*titles, "10,000 on disk"], rows)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
