"""Finished calibrations side by side, one row each, for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from boundary.intervals import Interval
from boundary.report.quoting import printable
from boundary.report.report import CalibrationReport
from boundary.selection import Selection


def report_table(reports: Sequence[CalibrationReport]) -> Table:
    """A rich table in the order given; mean scores are over all `n` samples of a calibration.

    Each control that any of the reports has is a column. The interval beside a verdict is that of
    (proposed depth - full) on the confirming half. Saved are applications of LoRA layers.
    """
    controls = list(dict.fromkeys(name for report in reports for name in report.controls))
    numbers = ["n", "base", "chosen", "full", *controls, "depth", "saved"]
    header = ["adapter", "metric", *numbers, "verdict"]
    rows = [_row(report, controls) for report in reports]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for index, name in enumerate(header):
        if 2 <= index < 2 + len(numbers):
            table.add_column(Text(printable(name)), justify="right", no_wrap=True)
        else:  # words are folded, so that two controls fit into 80 characters; numbers never are
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, in which no markup is read
    return table


def _row(report: CalibrationReport, controls: Sequence[str]) -> list[str]:
    selection = report.selection
    return [
        printable(report.adapter),
        printable(report.metric),
        str(selection.num_samples),
        *(_number(score) for score in report.scores.values()),
        *(
            _number(report.controls[name].mean) if name in report.controls else ""
            for name in controls
        ),
        f"{selection.depth}/{report.num_layers}",
        f"{report.share_saved:.0%}",
        _verdict(selection),
    ]


def _verdict(selection: Selection) -> str:
    words = selection.verdict.replace("_", " ")
    if selection.confirmed_on is None:
        return f"{words}: needs {selection.num_samples_needed}"
    interval = _interval(selection.confirmed_on.to_full)
    if selection.verdict != "keep_full":
        return f"{words} {interval}"
    if selection.proposed_depth == len(selection.curve) - 1:
        return words
    return f"{words} (depth {selection.proposed_depth}: {interval})"


def _interval(interval: Interval) -> str:
    low, high = _number(interval.low, "+"), _number(interval.high, "+")
    return f"{_number(interval.mean, '+')} [{low}, {high}]"


def _number(value: float, sign: str = "") -> str:
    """Three decimals, or two figures where those would show nothing."""
    shape = ".3f" if value == 0 or 0.01 <= abs(value) < 1e4 else ".2g"
    return format(value, sign + shape)
