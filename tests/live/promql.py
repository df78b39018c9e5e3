"""A dashboard's queries, and what is wrong with them beside what a server exposes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

SCRAPED = {"job", "instance"}
"""Labels that Prometheus itself adds."""
VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}
"""Grafana's own, and durations that stand for them."""

Exposed = dict[str, list[set[str]]]
"""Label names of every sample, by its name."""


def exposed(text: str) -> Exposed:
    """Of a scrape."""
    found: Exposed = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(set(sample.labels) | SCRAPED)
    return found


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel."""

    panel: str
    text: str
    legend: str


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Of every panel, also of those in closed rows."""
    for panel in dashboard["panels"]:
        yield from queries(panel) if panel.get("panels") else ()
        for target in panel.get("targets", []):
            yield Query(panel["title"], target["expr"], target["legendFormat"])


def variables(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Metric and label of each of the dashboard's `label_values(metric, label)`."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"]["query"]
            match = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", text)
            assert match, text
            yield match[1], match[2]


def problems(query: Query, server: Exposed) -> list[str]:
    """What it asks for and the server does not have. Raises ValueError for what is no PromQL."""
    text = query.text
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    checker = _Checker(server)
    labels = checker.labels(promql_parser.parse(text))
    for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
        if label not in labels:
            checker.problems.append(f"the legend's {label!r} is no label of the result")
    return checker.problems


class _Checker:
    """Follows the labels that each part of a query has."""

    def __init__(self, server: Exposed) -> None:
        self._server = server
        self.problems: list[str] = []

    def labels(self, expr: promql_parser.Expr) -> set[str]:
        match expr:
            case promql_parser.VectorSelector():
                return self._selected(expr)
            case promql_parser.MatrixSelector():
                return self._selected(expr.vector_selector)
            case promql_parser.AggregateExpr():
                return self._aggregated(expr)
            case promql_parser.BinaryExpr():
                return self.labels(expr.lhs) | self.labels(expr.rhs)
            case promql_parser.Call():
                found = set().union(*(self.labels(argument) for argument in expr.args))
                if expr.func.name == "histogram_quantile":
                    if "le" not in found:
                        self.problems.append("histogram_quantile needs 'le'")
                    found -= {"le"}
                return found
            case (
                promql_parser.ParenExpr() | promql_parser.SubqueryExpr() | promql_parser.UnaryExpr()
            ):
                return self.labels(expr.expr)
            case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
                return set()
        raise TypeError(type(expr))

    def _selected(self, selector: promql_parser.VectorSelector) -> set[str]:
        samples = self._server.get(selector.name or "")
        if samples is None:
            self.problems.append(f"no metric {selector.name!r}")
            return set()
        everywhere = set.intersection(*samples)
        for matcher in selector.matchers.matchers:
            if matcher.name not in everywhere:
                self.problems.append(f"{selector.name!r} has no label {matcher.name!r}")
        return everywhere

    def _aggregated(self, expr: promql_parser.AggregateExpr) -> set[str]:
        inner = self.labels(expr.expr)
        if str(expr.op) in ("topk", "bottomk"):
            return inner
        if expr.modifier is None:
            return set()
        given = set(expr.modifier.labels)
        for label in given - inner:
            self.problems.append(f"it aggregates by {label!r}, which is no label there")
        is_by = expr.modifier.type == promql_parser.AggModifierType.By
        return given if is_by else inner - given
