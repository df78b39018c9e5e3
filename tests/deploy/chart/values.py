"""Configurations of the chart: its own files of values, and features that any two of may be together."""

from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.chart.settings_schema import CHART

Values = dict[str, Any]

DEFAULTS: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
FILES = sorted((CHART / "ci").glob("*-values.yaml"))

POSTGRES = {"secrets": {"database": {"existingSecret": "database", "existingKey": "uri"}}}
SHARED = {"enabled": True, "accessModes": ["ReadWriteMany"]}

FEATURES: dict[str, Values] = {
    "gpu": {"gpu": {"count": 1}},
    "replicas": {"replicaCount": 3, **POSTGRES},
    "autoscaling": {"autoscaling": {"enabled": True}, **POSTGRES},
    "state": {"persistence": {"state": SHARED}},
    "adapters": {"persistence": {"adapters": SHARED}},
    "models": {"persistence": {"models": SHARED}, "settings": {"model": "/models/base"}},
    "existing claim": {"persistence": {"data": {**SHARED, "existingClaim": "samples"}}},
    "admin": {"secrets": {"adminKey": {"value": "k"}, **POSTGRES["secrets"]}},
    "keys file": {
        "secrets": {
            "keysFile": {"existingSecret": "keys", "existingKey": "k"},
            **POSTGRES["secrets"],
        }
    },
    "open": {"settings": {"insecure": True}},
    "ingress": {"ingress": {"enabled": True, "hosts": ["models.example"]}},
    "monitor": {"serviceMonitor": {"enabled": True}},
    "no policy": {"networkPolicy": {"enabled": False}},
    "no budget": {"podDisruptionBudget": {"enabled": False}},
    "no account": {"serviceAccount": {"create": False}},
}

PAIRS = list(combinations(FEATURES, 2))


def load(path: Path) -> Values:
    """One file of values."""
    values: Values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def merged(*layers: Values) -> Values:
    """As Helm lays one file of values over another."""
    result: Values = {}
    for layer in layers:
        for key, value in layer.items():
            is_deeper = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if is_deeper else value
    return result


def at(path: str, value: object) -> Values:
    """`a.b` and a value as `{a: {b: value}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


EVERYTHING = load(CHART / "ci" / "everything-values.yaml")
"""Each value that has a default of nothing, set."""
