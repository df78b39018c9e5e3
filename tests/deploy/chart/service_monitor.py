"""What a ServiceMonitor may hold, after the Prometheus operator's documented Go types.

Written by hand, because the operator's own definition is on no package index: of the fields, those that a
scrape without TLS and passwords has, and no others, so that a misspelt one is refused.
"""

from tests.deploy.json_schema import closed_object

_DURATION = {
    "type": "string",
    "pattern": r"^(0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
    "minLength": 1,
}
_STRING = {"type": "string"}
_STRINGS = {"type": "array", "items": _STRING}
_LABELS = {"type": "object", "additionalProperties": _STRING}
_NUMBER = {"type": "integer", "minimum": 0}
_BOOLEAN = {"type": "boolean"}
_ACTIONS = (
    "replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase",
    "keepequal", "dropequal",
)  # fmt: skip

_RELABELINGS = {
    "type": "array",
    "items": closed_object(
        {
            "sourceLabels": {
                "type": "array",
                "items": {"type": "string", "pattern": "^[a-zA-Z_]\\w*$"},
            },
            "separator": _STRING,
            "targetLabel": _STRING,
            "regex": _STRING,
            "modulus": _NUMBER,
            "replacement": _STRING,
            "action": {"enum": list(_ACTIONS)},
        }
    ),
}

_ENDPOINT = closed_object(
    {
        "port": _STRING,
        "targetPort": {"type": ["integer", "string"]},
        "path": _STRING,
        "scheme": {"enum": ["http", "https"]},
        "params": {"type": "object", "additionalProperties": _STRINGS},
        "interval": _DURATION,
        "scrapeTimeout": _DURATION,
        "honorLabels": _BOOLEAN,
        "honorTimestamps": _BOOLEAN,
        "metricRelabelings": _RELABELINGS,
        "relabelings": _RELABELINGS,
        "followRedirects": _BOOLEAN,
        "enableHttp2": _BOOLEAN,
        "filterRunning": _BOOLEAN,
    }
)

SERVICE_MONITOR = closed_object(
    {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": closed_object(
            {"name": _STRING, "namespace": _STRING, "labels": _LABELS, "annotations": _LABELS},
            "name",
        ),
        "spec": closed_object(
            {
                "jobLabel": _STRING,
                "targetLabels": _STRINGS,
                "podTargetLabels": _STRINGS,
                "endpoints": {"type": "array", "items": _ENDPOINT, "minItems": 1},
                "selector": closed_object({"matchLabels": _LABELS}),
                "namespaceSelector": closed_object({"any": _BOOLEAN, "matchNames": _STRINGS}),
                "sampleLimit": _NUMBER,
                "targetLimit": _NUMBER,
                "labelLimit": _NUMBER,
                "attachMetadata": closed_object({"node": _BOOLEAN}),
            },
            "endpoints",
            "selector",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)
