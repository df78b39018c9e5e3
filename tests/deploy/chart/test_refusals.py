"""values.schema.json refuses what is wrong, and templates what does not go together; both in words."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from server.config import Settings
from tests.deploy.chart.helm_process import Helm, Refused
from tests.deploy.chart.settings_schema import SCHEMA, SECRET, settings_schema
from tests.deploy.chart.values import DEFAULTS, EVERYTHING, FEATURES, Values, at, merged

VALUES_SCHEMA = json.loads(SCHEMA.read_text(encoding="utf-8"))

FREE = {
    "commonLabels", "podLabels", "podAnnotations", "nodeSelector", "affinity", "podSecurityContext",
    "securityContext", "resources.requests", "resources.limits", "persistence.state.annotations",
    "persistence.models.annotations", "persistence.adapters.annotations", "persistence.data.annotations",
    "service.annotations", "ingress.annotations", "serviceMonitor.labels", "serviceAccount.annotations",
}  # fmt: skip
"""Objects whose keys are Kubernetes' or the user's."""

WRONG = [
    ("image.repository", ""),
    ("image.tag", "a tag"),
    ("image.digest", "sha256:abc"),
    ("image.pullPolicy", "Sometimes"),
    ("imagePullSecrets", ["registry"]),
    ("fullnameOverride", "Fathom"),
    ("replicaCount", -1),
    ("replicaCount", "2"),
    ("replicaCount", 1.5),
    ("extraEnv", {"A": "b"}),
    ("extraEnv", [{"value": "b"}]),
    ("extraVolumeMounts", [{"name": "a"}]),
    ("secrets.apiKey", "a-key"),
    ("secrets.apiKey.generate", "yes"),
    ("secrets.adminKey", {"value": "a", "existingSecret": "b", "existingKey": "c"}),
    ("secrets.adminKey", {"existingSecret": "b"}),
    ("secrets.adminKey", {"existingKey": "b"}),
    ("secrets.database.value", "mysql://fathom@database.example/fathom"),
    ("secrets.database.value", "postgresql://"),
    ("persistence.adapters.accessModes", []),
    ("persistence.adapters.accessModes", ["ReadWriteMost"]),
    ("persistence.adapters.size", "20"),
    ("persistence.adapters.existingClaim", "My Claim"),
    ("persistence.state.readOnly", True),
    ("gpu.count", 2),
    ("gpu.count", True),
    ("gpu.resource", "gpu"),
    ("resources.limits.memory", "4 GiB"),
    ("probes.startup.failureThreshold", 0),
    ("probes.liveness.path", "/"),
    ("preStopSleepSeconds", -1),
    ("strategy.type", "Replace"),
    ("podDisruptionBudget.minAvailable", 0),
    ("podDisruptionBudget.maxUnavailable", "150%"),
    ("autoscaling.minReplicas", 0),
    ("autoscaling.waiting.target", 0),
    ("autoscaling.waiting.metric", "a/b"),
    ("autoscaling.running.targetPercent", 101),
    ("autoscaling.behavior.scaleUp.policies", [{"type": "Pods"}]),
    ("service.type", "ExternalName"),
    ("service.port", 70000),
    ("ingress.enabled", True),
    ("ingress", {"enabled": True, "hosts": ["https://models.example"]}),
    ("networkPolicy.database.port", 0),
    ("networkPolicy.from", {}),
    ("serviceMonitor.interval", "15"),
    ("serviceMonitor.interval", 15),
    ("podAnnotations", {"a": True}),
    ("tolerations", {}),
    ("settings.host", "127.0.0.1"),
    ("settings.host", "localhost"),
    ("settings.port", 0),
    ("settings.max_num_seqs", 0),
    ("settings.max_num_seqs", None),
    ("settings.max_num_seqs", "64"),
    ("settings.kv_cache_bytes", "1,5GiB"),
    ("settings.kv_cache_bytes", 1),
    ("settings.dtype", "int8"),
    ("settings.cors_origin", ["app.example"]),
    ("settings.adapter", ["sql=/adapters/sql"]),
    ("settings.adapter", {"sql": ""}),
    ("settings.calibration_share", 0),
    ("settings.drain_timeout_s", -1),
    ("settings.log_prompts", "no"),
    ("settings.api_key", "a-key"),
    ("settings.database", "sqlite:////state/a.db"),
]


def objects(values: Values, path: str = "") -> Iterator[str]:
    """Every object of the values whose keys are the chart's."""
    yield path
    for key, value in values.items():
        below = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and below not in FREE:
            yield from objects(value, below)


def refusal(helm: Helm, values: Values) -> str:
    with pytest.raises(Refused) as refused:
        helm.manifests(values)
    return str(refused.value)


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_value_is_refused_by_its_name(helm: Helm, path: str, value: object) -> None:
    words = refusal(helm, at(path, value))
    assert f"/{path.split('.')[0]}" in words
    assert "at '/" in words


def test_an_unknown_key_is_refused_wherever_it_is(helm: Helm) -> None:
    places = list(objects(DEFAULTS))
    assert len(places) > 30
    for place in places:
        words = refusal(helm, at(f"{place}.unheardOf".lstrip("."), "x"))
        assert "additional properties 'unheardOf' not allowed" in words, place


def test_the_schema_has_every_default_and_a_type_for_each() -> None:
    jsonschema.Draft7Validator.check_schema(VALUES_SCHEMA)
    assert list(jsonschema.Draft7Validator(VALUES_SCHEMA).iter_errors(DEFAULTS)) == []
    assert {*DEFAULTS, "global"} == set(VALUES_SCHEMA["properties"])


def test_settings_are_the_servers() -> None:
    """After a change of settings: `python -m tests.deploy.chart.settings_schema`."""
    assert VALUES_SCHEMA["properties"]["settings"] == settings_schema()
    assert set(settings_schema()["properties"]) | set(SECRET) == set(Settings.model_fields)
    assert set(EVERYTHING["settings"]) == set(settings_schema()["properties"])


MANY = at("replicaCount", 2)
TOGETHER = [
    (merged(MANY, at("secrets.adminKey.value", "k")), "secrets.adminKey need secrets.database"),
    (merged(MANY, at("secrets.keysFile.value", "{}")), "secrets.keysFile need secrets.database"),
    (
        merged(at("autoscaling.enabled", True), at("secrets.adminKey.value", "k")),
        "secrets.adminKey need secrets.database",
    ),
    (merged(MANY, at("secrets.database.value", "sqlite:////state/a.db")), "need PostgreSQL"),
    (merged(MANY, at("persistence.state.enabled", True)), "accessModes of persistence.state"),
    (
        {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}},
        "minReplicas is above",
    ),
    (at("secrets.apiKey.generate", False), "anybody could ask"),
    ({"gpu": {"count": 1}, "settings": {"device": "cpu"}}, "settings.device says cpu"),
    (at("extraEnv", [{"name": "FATHOM_PORT", "value": "1"}]), "FATHOM_PORT goes to settings"),
    (at("extraArgs", ["--drain-timeout-s", "600"]), "--drain-timeout-s would go past"),
    (at("extraArgs", ["--port=1"]), "--port=1 would go past"),
    (at("settings.model", "/models/base"), "enable persistence.models"),
    (at("settings.adapter", {"a": "/adapters/a"}), "enable persistence.adapters"),
    (at("settings.data_root", "/data"), "enable persistence.data"),
]


@pytest.mark.parametrize(("values", "words"), TOGETHER, ids=lambda part: str(part)[:40])
def test_what_does_not_go_together_is_refused_in_words(
    helm: Helm, values: Values, words: str
) -> None:
    assert re.search(re.escape(words), refusal(helm, values))


@pytest.mark.parametrize(
    "values",
    [
        MANY,
        merged(MANY, FEATURES["admin"]),
        merged(MANY, FEATURES["state"]),
        merged(FEATURES["autoscaling"], at("autoscaling.maxReplicas", 1)),
        merged(at("secrets.apiKey.generate", False), FEATURES["admin"]),
        merged(at("secrets.apiKey.generate", False), FEATURES["open"]),
        at("extraArgs", ["--no-console", "--portable"]),
        merged(at("settings.model", "/models/base"), FEATURES["models"]),
        at("settings.model", "/modelship"),
        at("settings.kv_cache_bytes", 1 << 40),
        at("global.imageRegistry", "a-parent-chart's"),
    ],
    ids=lambda values: str(values)[:40],
)
def test_what_is_right_is_not_refused(helm: Helm, values: Any) -> None:
    assert helm.manifests(values)
