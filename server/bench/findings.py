"""Findings of a measurement: tables on standard output, and one JSON object with machine and versions."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.bench.report import machine, versions

SCHEMA = 1


def show(
    tables: Sequence[Table],
    facts: Mapping[str, Any],
    findings: Any,
    path: Path | None,
    lines: Sequence[str] = (),
) -> None:
    """Print; and write where there is a path. `findings`: dataclasses, or containers of them."""
    here = machine()
    console = Console(highlight=False)
    console.print(
        f"{here['cpu']} ({here['num_cores']} cores, {here['num_threads']} threads, load"
        f" {here['load_average_1m']:.1f})"
    )
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)
    if path is not None:
        content = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "machine": here,
            "versions": versions(),
            "facts": dict(facts),
            "findings": findings,
        }
        path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")


def command() -> list[str]:
    """How this process was started, as one would type it: without the place of the program."""
    module = sys.modules["__main__"].__spec__
    started = (
        [Path(sys.argv[0]).name]
        if module is None
        else ["python", "-m", module.name.removesuffix(".__main__")]
    )
    return [*started, *sys.argv[1:]]
