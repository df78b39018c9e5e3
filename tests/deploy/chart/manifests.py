"""Looking into what was rendered."""

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

from tests.deploy.chart.service_monitor import SERVICE_MONITOR

Manifest = dict[str, Any]

OLDEST, NEWEST = "1.27", "1.37"
"""Kubernetes' versions: the one that Chart.yaml asks for, and the last one whose types are at hand."""


def problem(manifest: Manifest, version: str = NEWEST) -> str | None:
    """What a strict look finds wrong; None: nothing."""
    return _problem(json.dumps(manifest, sort_keys=True), version)


@cache
def _problem(text: str, version: str) -> str | None:
    manifest = json.loads(text)
    if manifest["kind"] == "ServiceMonitor":
        errors = jsonschema.Draft202012Validator(SERVICE_MONITOR).iter_errors(manifest)
        return next((error.message for error in errors), None)
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except (
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
    ) as error:
        return f"{manifest['kind']}: {error.message}"
    return None


def kinds(manifests: Iterable[Manifest]) -> set[str]:
    """Of everything but what `helm test` runs."""
    return {each["kind"] for each in manifests if not is_test(each)}


def is_test(manifest: Manifest) -> bool:
    """Whether it is there for `helm test` alone."""
    return "helm.sh/hook" in manifest["metadata"].get("annotations", {})


def the(kind: str, manifests: Iterable[Manifest]) -> Manifest:
    """The one of its kind."""
    (found,) = [each for each in manifests if each["kind"] == kind and not is_test(each)]
    return found


def pod_of(manifests: Iterable[Manifest]) -> Manifest:
    """The server's pod."""
    template: Manifest = the("Deployment", manifests)["spec"]["template"]
    return template


def container_of(manifests: Iterable[Manifest]) -> Manifest:
    """The server's container."""
    (container,) = pod_of(manifests)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def environment(container: Manifest) -> dict[str, Any]:
    """Variables by name: a text, or where it comes from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def toml_of(manifests: Iterable[Manifest]) -> str:
    """The server's file of settings."""
    text: str = the("ConfigMap", manifests)["data"]["fathom.toml"]
    return text
