"""Finished calibrations side by side, one row each, for a terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from boundary.quoting import printable
from boundary.report import CalibrationReport, number
from boundary.selection import Half, Selection


def report_table(reports: Sequence[CalibrationReport]) -> Table:
    """A rich table in the order given; mean scores are over all samples of a calibration.

    Each control that any of the reports has is a column. The interval beside a verdict is that of
    (proposed depth - full) on the confirming half.
    """
    controls = list(dict.fromkeys(name for report in reports for name in report.controls))
    table = Table(caption="verdicts rest on the half of the samples that took no part in choosing")
    table.add_column("adapter", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("samples", "base", "chosen", "full", *controls, "depth"):
        table.add_column(Text(printable(name)), justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    table.add_column("LoRA saved", justify="right")
    for report in reports:
        selection = report.selection
        cells = [printable(report.adapter), printable(report.metric), str(selection.num_samples)]
        cells += map(number, report.scores.values())
        cells += [
            number(report.controls[name].mean) if name in report.controls else ""
            for name in controls
        ]
        cells += [f"{selection.depth} of {report.num_layers}"]
        cells += [_verdict(selection), f"{report.share_saved:.0%}"]
        table.add_row(*map(Text, cells))  # as Text, in which no markup is read
    return table


def _verdict(selection: Selection) -> str:
    words = selection.verdict.replace("_", " ")
    if selection.confirmed_on is None:
        return f"{words}: needs {selection.num_samples_needed}"
    if selection.verdict != "keep_full":
        return f"{words} {_interval(selection.confirmed_on)}"
    if selection.proposed_depth == len(selection.curve) - 1:
        return words
    return f"{words} (depth {selection.proposed_depth}: {_interval(selection.confirmed_on)})"


def _interval(half: Half) -> str:
    mean, low, high = (
        number(value, signed=True)
        for value in (half.to_full.mean, half.to_full.low, half.to_full.high)
    )
    return f"{mean} [{low}, {high}]"
