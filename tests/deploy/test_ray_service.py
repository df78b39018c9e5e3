"""KubeRay's manifest holds what its custom resource has, and nothing else."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart.manifests import NEWEST, OLDEST
from tests.deploy.ray_service import problems

MANIFEST = Path(__file__).parents[2] / "deploy" / "ray" / "rayservice.yaml"
CLUSTER = "spec.rayClusterConfig"
CONTAINER = f"{CLUSTER}.workerGroupSpecs.0.template.spec.containers.0"


@pytest.fixture
def manifest() -> Any:
    # Anchors make parts of it one object, and the changes below are meant for one place.
    return deepcopy(yaml.safe_load(MANIFEST.read_text(encoding="utf-8")))


def _place(manifest: Any, path: str) -> tuple[Any, Any]:
    """What holds the last part of a dotted path, and that part."""
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in way:
        manifest = manifest[part]
    return manifest, last


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
def test_it_is_a_ray_service(manifest: Any, kubernetes: str) -> None:
    assert problems(manifest, kubernetes) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v1alpha1"),
        ("kind", "RayCluster"),
        ("metadata.label", {}),
        ("spec.serveConfig", "a field of the version before"),
        ("spec.serveConfigV2", {"applications": []}),
        ("spec.rayClusterSpec", {}),
        (f"{CLUSTER}.rayVersion", 2.60),
        (f"{CLUSTER}.enableInTreeAutoscaling", "true"),
        (f"{CLUSTER}.autoscalerOptions", {"upscalingMode": "Fast"}),
        (f"{CLUSTER}.autoscalerOptions", {"resources": {"limit": {"cpu": "1"}}}),
        (f"{CLUSTER}.workerGroupSpecs.0.rayStartParams", {"num-cpus": 8}),
        (f"{CLUSTER}.workerGroupSpecs.0.maxReplicas", "4"),
        (f"{CLUSTER}.workerGroupSpecs.0.maxReplica", 4),
        (f"{CLUSTER}.headGroupSpec.replicas", 1),
        (f"{CLUSTER}.headGroupSpec.headService", {"spec": {"port": 80}}),
        (f"{CONTAINER}.envForm", []),
        (f"{CONTAINER}.ports.0.containerPort", "serve"),
        (f"{CONTAINER}.resources.limit", {}),
        (f"{CLUSTER}.headGroupSpec.template.spec.securityContext.runAsNonroot", True),
    ],
)
def test_a_field_that_it_does_not_have_or_of_another_type_is_found(
    manifest: Any, path: str, value: object
) -> None:
    holder, last = _place(manifest, path)
    holder[last] = value
    assert problems(manifest, NEWEST)


@pytest.mark.parametrize(
    "path",
    [
        f"{CLUSTER}.headGroupSpec",
        f"{CLUSTER}.headGroupSpec.template",
        f"{CLUSTER}.headGroupSpec.rayStartParams",
        f"{CLUSTER}.workerGroupSpecs.0.groupName",
        f"{CLUSTER}.workerGroupSpecs.0.minReplicas",
        f"{CLUSTER}.workerGroupSpecs.0.template.spec.containers",
        f"{CONTAINER}.name",
    ],
)
def test_what_it_requires_is_missed(manifest: Any, path: str) -> None:
    holder, last = _place(manifest, path)
    del holder[last]
    assert problems(manifest, NEWEST)
