"""What a RayService may hold: the schema of KubeRay's custom resource, of version 1.1.

The operator's definition is on no package index, so its own fields are written down here: all of the spec,
with types, what is required and what an enumeration allows, after `ray.io_rayservices.yaml` and the Go types
that it is made from. It repeats Kubernetes' own types at length; these are looked up in Kubernetes' strict
schemas instead. A field that it does not have is refused here; the API server would drop it in silence.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

from tests.deploy.json_schema import closed_object

_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_STRINGS = {"type": "array", "items": _STRING}
_STRING_MAP = {"type": "object", "additionalProperties": _STRING}
_OF_KUBERNETES = {"type": "object"}

_AUTOSCALER = closed_object(
    {
        "env": {"type": "array", "items": _OF_KUBERNETES},
        "envFrom": {"type": "array", "items": _OF_KUBERNETES},
        "idleTimeoutSeconds": _INT32,
        "image": _STRING,
        "imagePullPolicy": _STRING,
        "resources": _OF_KUBERNETES,
        "securityContext": _OF_KUBERNETES,
        "upscalingMode": {"type": "string", "enum": ["Default", "Aggressive", "Conservative"]},
        "volumeMounts": {"type": "array", "items": _OF_KUBERNETES},
    }
)
_HEAD = closed_object(
    {
        "enableIngress": _BOOLEAN,
        "headService": _OF_KUBERNETES,
        "rayStartParams": _STRING_MAP,
        "serviceType": _STRING,
        "template": _OF_KUBERNETES,
    },
    "rayStartParams",
    "template",
)
_WORKERS = closed_object(
    {
        "groupName": _STRING,
        "maxReplicas": _INT32,
        "minReplicas": _INT32,
        "numOfHosts": _INT32,
        "rayStartParams": _STRING_MAP,
        "replicas": _INT32,
        "scaleStrategy": closed_object(
            {"multihostReplicasToDelete": _STRINGS, "workersToDelete": _STRINGS}
        ),
        "template": _OF_KUBERNETES,
    },
    "groupName",
    "maxReplicas",
    "minReplicas",
    "rayStartParams",
    "template",
)
_CLUSTER = closed_object(
    {
        "autoscalerOptions": _AUTOSCALER,
        "enableInTreeAutoscaling": _BOOLEAN,
        "headGroupSpec": _HEAD,
        "headServiceAnnotations": _STRING_MAP,
        "rayVersion": _STRING,
        "suspend": _BOOLEAN,
        "workerGroupSpecs": {"type": "array", "items": _WORKERS},
    },
    "headGroupSpec",
)
RAY_SERVICE = closed_object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": _OF_KUBERNETES,
        "spec": closed_object(
            {
                "deploymentUnhealthySecondThreshold": _INT32,
                "rayClusterConfig": _CLUSTER,
                "serveConfigV2": _STRING,
                "serveService": _OF_KUBERNETES,
                "serviceUnhealthySecondThreshold": _INT32,
            }
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def problems(manifest: dict[str, Any], kubernetes: str) -> list[str]:
    """What a strict look finds wrong, with Kubernetes' types of that version (`1.27`)."""
    found = [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft202012Validator(RAY_SERVICE).iter_errors(manifest)
    ]
    if found:
        return found
    for each in _embedded(manifest):
        try:
            kubernetes_validate.validate(each, kubernetes, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{each['kind']}: {error.message}")
    return found


def _embedded(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kubernetes' own objects in it, each as a manifest that can be looked up."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterConfig", {"headGroupSpec": {}})
    head = cluster["headGroupSpec"]
    metadata = {"name": "part"}
    for group in (head, *cluster.get("workerGroupSpecs", ())):
        if "template" in group:
            yield _core("PodTemplate", metadata=manifest["metadata"], template=group["template"])
    for service in (spec.get("serveService"), head.get("headService")):
        if service is not None:
            yield _core("Service", **{"metadata": metadata, **service})
    scaler = cluster.get("autoscalerOptions")
    if scaler is not None:
        kept = ("env", "envFrom", "image", "imagePullPolicy", "resources", "securityContext")
        container = {key: scaler[key] for key in (*kept, "volumeMounts") if key in scaler}
        yield _core(
            "Pod", metadata=metadata, spec={"containers": [{"name": "autoscaler", **container}]}
        )


def _core(kind: str, **fields: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, **fields}
