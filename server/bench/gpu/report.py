"""What was found, as a short table and as JSON, with the targets it is held against."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from server.bench.check import CheckResult
from server.bench.gpu.agreement import Agreement
from server.bench.gpu.kernel_times import KernelTime
from server.bench.report import machine, versions

SCHEMA = 1
_NUM_KERNELS = 20
ONE, BASE, MIXED, PEFT, CONTINUOUS = (
    "one stream, base", "streams, base", "streams, mixed", "peft mixed batch", "continuous batching",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is aimed at."""

    name: str
    value: float | None
    """The median over the rounds; None where a side was not measured."""
    at_least: float

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.at_least else "missed"


@dataclass(slots=True)
class GpuReport:
    """Grows while the parts run."""

    facts: dict[str, Any]
    agreements: list[Agreement] = field(default_factory=list)
    check: CheckResult | None = None
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Tokens a second of each side, one a round."""
    kernels: dict[str, list[KernelTime]] = field(default_factory=dict)
    """Of one step of each side, longest first."""
    limit: float | None = None
    """Tokens a second of one stream at which only the weights are read, as fast as a copy reads."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether every comparison that was made passed."""
        checked = self.check is None or self.check.is_passed
        return checked and all(agreement.is_passed for agreement in self.agreements)

    def add(self, side: str, rate: float) -> None:
        """One round of one side."""
        self.rates.setdefault(side, []).append(rate)

    def targets(self) -> list[Target]:
        """Issue 4's, in its order."""
        one = self.rates.get(ONE)
        share = None if one is None or self.limit is None else median(one) / self.limit
        return [
            Target("one stream over the limit of bandwidth", share, 0.8),
            Target("mixed adapters and depths over base", self._ratio(MIXED, BASE), 0.95),
            Target("mixed over PEFT's mixed batch", self._ratio(MIXED, PEFT), 10.0),
            Target("base over continuous batching", self._ratio(BASE, CONTINUOUS), 1.2),
        ]

    def _ratio(self, ours: str, theirs: str) -> float | None:
        pairs = list(zip(self.rates.get(ours, []), self.rates.get(theirs, []), strict=False))
        return median(our / their for our, their in pairs) if pairs else None

    def as_dict(self, command: Sequence[str]) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "machine": machine(),
            "versions": versions(),
            "facts": self.facts,
            "agreements": [
                asdict(each) | {"is_passed": each.is_passed} for each in self.agreements
            ],
            "check": self.check and asdict(self.check) | {"is_passed": self.check.is_passed},
            "rates": self.rates,
            "kernels": {
                side: [asdict(each) for each in times] for side, times in self.kernels.items()
            },
            "limit": self.limit,
            "targets": [asdict(each) | {"verdict": each.verdict} for each in self.targets()],
            "notes": self.notes,
        }


def write(report: GpuReport, command: Sequence[str], path: Path) -> None:
    """One indented JSON object."""
    text = json.dumps(report.as_dict(command), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def show(report: GpuReport) -> None:
    """Tables on standard output."""
    console = Console(highlight=False)
    here = machine()
    console.print(f"{here['gpu'] or here['cpu']}; {_listed(report.facts)}")
    console.print(_listed(versions()))
    for agreement in report.agreements:
        verdict = "agrees" if agreement.is_passed else "DIFFERS"
        console.print(
            f"{agreement.what} {verdict}: {agreement.error:.1e} at most over"
            f" {agreement.num_compared} (limit {agreement.tolerance:.0e})"
        )
    if report.check is not None:
        console.print(str(report.check), soft_wrap=True)
    if report.rates:
        console.print(_rates(report))
        for target in report.targets():
            value = "-" if target.value is None else f"{target.value:.2f}"
            console.print(f"{target.name}: {value} (target {target.at_least:g}) {target.verdict}")
    for side, times in report.kernels.items():
        console.print(_kernels(side, times))
    for note in report.notes:
        console.print(note, markup=False)


def _rates(report: GpuReport) -> Table:
    table = Table(caption="tokens a second while every stream decodes")
    for title in ("", "median", "least", "most", "rounds"):
        table.add_column(title, justify="right" if title else "left")
    for side, rates in report.rates.items():
        cells = (f"{value:.1f}" for value in (median(rates), min(rates), max(rates)))
        table.add_row(side, *cells, str(len(rates)))
    if report.limit is not None:
        table.add_row("one stream, limit of bandwidth", f"{report.limit:.1f}", "", "", "")
    return table


def _kernels(side: str, times: Sequence[KernelTime]) -> Table:
    launches, total = sum(t.launches for t in times), sum(t.microseconds for t in times)
    title = f"{side}: {launches:.0f} kernels a step, {total:.0f} us"
    table = Table(title=title, caption="a step; the longest")
    for column in ("kernel", "launches", "us"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for time in times[:_NUM_KERNELS]:
        table.add_row(time.name, f"{time.launches:.1f}", f"{time.microseconds:.1f}")
    return table


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
