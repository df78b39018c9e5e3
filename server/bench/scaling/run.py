"""A curve from its plan to its findings, and what every measurement here has in common."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from server.bench.findings import show
from server.bench.scaling.curve import measure_curve
from server.bench.scaling.drawing import Panel, draw
from server.bench.scaling.explanation import explain
from server.bench.scaling.loads import CurvePlan
from server.bench.scaling.options import ScalingOptions
from server.bench.scaling.report import curve_table, explanation_lines, explanation_table
from server.bench.scaling.served import Served
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.loading import load_engine, progress_on_stderr
from server.logs import configure_logs


def run_curve(
    plan: CurvePlan,
    options: ScalingOptions,
    *,
    with_explanation: bool = False,
) -> int:
    """Serve, measure, show, draw."""
    configure_logs("warning")
    lines: list[str] = []
    tables: list[Table] = []
    findings: dict[str, Any] = {}
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, plan.ranks, directory, progress)
        settings = served.settings(max_len=plan.max_len, concurrency=plan.max_concurrency)
        with ExitStack() as stack:
            engine = open_engine(stack, settings)
            curve = measure_curve(engine, plan.quantity, plan.loads, options.repeat, progress)
        findings["curve"] = curve
        if with_explanation:
            depths = sorted({0, served.shape.num_layers, *(point.x for point in curve.points)})
            explanation = findings["explanation"] = explain(
                settings,
                depths,
                num_rows=options.concurrency,
                context_len=options.prompt_len,
                repeat=options.repeat,
                progress=progress,
            )
            tables.append(explanation_table(explanation))
            lines = explanation_lines(explanation)
    facts = facts_of(options) | {"in flight": plan.max_concurrency}
    show([curve_table(curve), *tables], facts, findings, options.json, lines)
    if options.svg is not None:
        title = f"{options.random_model.partition(':')[0]}, {options.dtype}"
        draw([Panel.of(curve)], title=title, path=options.svg)
    return tell(curve.errors)


def facts_of(options: ScalingOptions) -> dict[str, Any]:
    """What it was measured with; a curve's own quantity is in its table."""
    facts = asdict(options)
    for name in ("json", "svg"):
        del facts[name]
    return facts


def open_engine(stack: ExitStack, settings: Settings) -> AsyncEngine:
    """An engine that is shut down with the stack."""
    engine = load_engine(settings)
    stack.callback(engine.shutdown)
    return engine


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for random weights, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        yield Path(directory)


def tell(errors: Sequence[str]) -> int:
    """Name what went wrong; the command's status."""
    for error in errors:
        sys.stderr.write(f"error: {error}\n")
    return int(bool(errors))
