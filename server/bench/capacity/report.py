"""Findings as tables."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.table import Table

from server.bench.capacity.comparison import QUANTITIES, Run, by_cell, middle
from server.bench.capacity.cost import Costs, Residual, StepCosts
from server.bench.capacity.measurement import Measured
from server.bench.capacity.planning import MAX_REPLICAS, Plan
from server.bench.measure import Percentiles


def measured_from(content: dict[str, Any]) -> Measured:
    """What `asdict` gave. Raises KeyError and TypeError."""
    return Measured(
        **content
        | {
            "costs": Costs.from_json(content["costs"]),
            "fitted": Residual(**content["fitted"]),
            "tested": Residual(**content["tested"]),
        }
    )


def cost_tables(found: Sequence[Measured]) -> list[Table]:
    """Terms, one column a model; then how far they are from the steps."""
    table = Table(caption="processor time of one thread; reading an adapter by the clock")
    table.add_column("one of")
    for one in found:
        table.add_column(f"{one.model}, µs", justify="right")
    for field in fields(StepCosts):
        costs = (getattr(one.costs.step, field.name) for one in found)
        table.add_row(field.name, *(f"{1e6 * cost:.3g}" for cost in costs))
    table.add_row("adapter into a slot", *(f"{1e6 * one.costs.load.slot_s:.3g}" for one in found))
    table.add_row("adapter read", *(f"{1e6 * one.costs.load.disk_s:.3g}" for one in found))
    residuals = Table(caption="|predicted / measured - 1| of single steps; bias: of their sum")
    for title in ("model", "steps", "number", "median", "p95", "most", "bias"):
        residuals.add_column(title)
    for one in found:
        for name, left in (("fitted", one.fitted), ("that took no part", one.tested)):
            shares = (left.median, left.p95, left.max, left.bias)
            residuals.add_row(
                one.model, name, str(left.num_steps), *(f"{share:.1%}" for share in shares)
            )
    return [table, residuals]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """One table a cell: medians of its rounds."""
    tables = []
    for group in by_cell(runs):
        cell = group[0].cell
        table = Table(
            title=f"{cell.num_adapters} adapters, load {cell.load:g}, {cell.rate:.2f} requests/s",
            caption="slowdown " + ", ".join(f"{run.slowdown:.2f}" for run in group),
        )
        for title in ("", "predicted", "measured", "error"):
            table.add_column(title, justify="right")
        for quantity, title in QUANTITIES.items():
            factor = 1000 if title.endswith("ms") else 1
            predicted, measured = (
                middle(group, side, quantity) for side in ("predicted", "measured")
            )
            error = f"{predicted / measured - 1:+.0%}" if measured else ""
            table.add_row(title, f"{predicted * factor:.3g}", f"{measured * factor:.3g}", error)
        tables.append(table)
    return tables


def plan_table(plans: Sequence[Plan]) -> Table:
    """One row a case."""
    table = Table(caption=plans[0].hardware)
    for title in PLAN_TITLES:
        table.add_column(title, justify="right")
    for one in plans:
        table.add_row(*plan_row(one))
    return table


PLAN_TITLES = (
    "routing", "slots", "Zipf", "depth", "replicas", "first token p50 / p95 / p99, ms",
    "between tokens p50 / p95 / p99, ms", "found in a slot", "in host memory", "rows a step",
    "with one fewer, p95 / p95, ms",
)  # fmt: skip


def plan_row(one: Plan) -> list[str]:
    """Of `PLAN_TITLES`."""
    case, best = one.case, one.enough
    row = [case.routing, str(case.slots), f"{case.demand.exponent:g}", f"{case.depth_share:g}"]
    fewer = "" if one.fewer is None else f"{_ms(one.fewer.first.p95)} / {_ms(one.fewer.gap.p95)}"
    if best is None:
        return [*row, f"more than {MAX_REPLICAS}", "", "", "", "", "", fewer]
    return [
        *row,
        str(best.num_replicas),
        _percentiles(best.first),
        _percentiles(best.gap),
        f"{best.slot_hit_rate:.0%}",
        f"{best.host_hit_rate:.0%}",
        f"{best.rows_per_step:.1f}",
        fewer,
    ]


def _percentiles(found: Percentiles) -> str:
    return " / ".join(_ms(value) for value in (found.p50, found.p95, found.p99))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:,.0f}"
