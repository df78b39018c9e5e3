"""Findings as tables: what a sweep costs and holds, and what a job does to streams."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from rich.filesize import decimal
from rich.table import Table

from server.bench.calibration.cost import SweepCost
from server.bench.calibration.latency import PERCENTS, CalibrationLatency, JobFacts
from server.bench.calibration.memory import SweepMemory
from server.bench.calibration.sides import REFERENCE
from server.bench.measure import Spread


def cost_table(found: Mapping[str, SweepCost]) -> Table:
    """One column a model."""
    table = Table(caption="over the reference of the same repeat: median (least to most)")
    for title in ("", *found):
        table.add_column(title, justify="right")
    rows: dict[str, Callable[[SweepCost], str]] = {
        "samples x tokens": lambda one: f"{one.num_samples} x {one.num_tokens}",
        "difference": lambda one: f"{max(one.max_differences.values()):.1e}",
        "depth to depth": lambda one: f"{one.step:.1e}",
        "reference, s": lambda one: _seconds(one.seconds.get(REFERENCE)),
        "layers": lambda one: f"{one.layer_evaluations:.3f}",
        "sweep": lambda one: _spread(one.ratios.get("sweep")),
        "server": lambda one: _spread(one.ratios.get("server")),
    }
    for title, cell in rows.items():
        table.add_row(title, *map(cell, found.values()))
    return table


def memory_table(found: Sequence[SweepMemory]) -> Table:
    """One row a limit."""
    table = Table(caption="layers: evaluations over those of one forward pass a depth")
    for title in ("max_tokens", "peak", "bound", "of it", "layers"):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.max_tokens),
            decimal(one.peak_bytes),
            decimal(one.bound_bytes),
            f"{one.peak_bytes / one.bound_bytes:.0%}",
            f"{one.layer_evaluations:.3f}",
        )
    return table


def latency_table(found: CalibrationLatency) -> Table:
    """One row a percentile; each cell the median over the jobs (least to most)."""
    table = Table(caption="between the tokens of a stream: median of the jobs (least to most)")
    for title in ("", "quiet, ms", "calibrating, ms", "ratio"):
        table.add_column(title, justify="right")
    runs = found.runs
    for percent in PERCENTS:
        table.add_row(
            f"p{percent}" if percent < 100 else "longest",
            _spread(Spread.of([1000 * run.quiet.by_percent[percent] for run in runs])),
            _spread(Spread.of([1000 * run.calibrating.by_percent[percent] for run in runs])),
            _spread(Spread.of([run.ratio(percent) for run in runs])),
        )
    return table


def job_lines(found: CalibrationLatency) -> list[str]:
    """How long the job took alone and beside the streams, and what it got."""
    beside = [f"job beside streams, quiet turns left out: {_job(run.job)}" for run in found.runs]
    return [f"job alone: {_job(found.alone)}", *beside]


def _job(job: JobFacts) -> str:
    seconds = f"{job.seconds:.1f} s" if job.is_finished else f"NOT done in {job.seconds:.0f} s"
    slices = [1000 * second for second in job.slice_s] or [0.0]
    return (
        f"{seconds}, {job.share:.1%} of it in {len(slices)} slices (median {median(slices):.1f} ms,"
        f" longest {max(slices):.1f} ms)"
    )


def _seconds(spread: Spread | None) -> str:
    return "not timed" if spread is None else f"{spread.median:.2f}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "not timed"
    digits = 2 if spread.max < 10 else 1
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f} to {spread.max:.{digits}f})"
