"""Helm itself, as the package `helm-python-sdk` carries it, in a process of its own.

Go's runtime would stay in the process that loads it: threads, signal handlers, a raised limit on open files,
which other tests look at. So this file is also the program that loads it: JSON lines in, JSON lines out.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

NOTES = "NOTES.txt"


class Refused(Exception):
    """Helm's own words for values, or a chart, that it does not take."""


class Helm:
    """Renders and lints charts; entered with `with`, and its process ends with the block."""

    def __init__(self, chart: Path) -> None:
        self.chart = chart
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def files(self, values: dict[str, Any] | None = None, name: str = "demo") -> dict[str, str]:
        """What the templates make, by their names in the chart. Raises Refused."""
        made: dict[str, str] = self._ask(
            {"do": "render", "chart": str(self.chart), "values": values or {}, "name": name}
        )
        return {path.partition("/templates/")[2]: text for path, text in made.items()}

    def manifests(
        self, values: dict[str, Any] | None = None, name: str = "demo"
    ) -> list[dict[str, Any]]:
        """Every object that would reach the cluster. Raises Refused."""
        return [
            manifest
            for path, text in self.files(values, name).items()
            if path != NOTES
            for manifest in yaml.safe_load_all(text)
            if manifest is not None
        ]

    def lint(self, values: dict[str, Any] | None = None, chart: Path | None = None) -> list[str]:
        """What `helm lint --strict` complains of, warnings included."""
        report = self._ask(
            {"do": "lint", "chart": str(chart or self.chart), "values": values or {}}
        )
        informs = 1
        said = [each["error"] for each in report["messages"] if each["severity"] > informs]
        return [*said, *report["errors"]]

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["made"]


def main() -> None:
    """Answer until standard input ends."""
    import helm_python as helm

    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "lint":
                made: Any = helm.lint(question["chart"], question["values"], strict=True)
            else:
                with helm.Chart.load(question["chart"]) as chart:
                    made = chart.render(
                        question["values"], name=question["name"], namespace="models"
                    )
        except helm.HelmError as error:
            answer = {"refused": str(error)}
        else:
            answer = {"made": made}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
