"""The part `settings` of the chart's values.schema.json, derived from the server's own settings.

`python -m tests.deploy.chart.settings_schema` writes it into the chart; a test holds the two together.
"""

import json
from pathlib import Path
from typing import Any

from server.config import Settings

CHART = Path(__file__).parents[3] / "deploy" / "helm" / "fathom"
SCHEMA = CHART / "values.schema.json"

SECRET = ("api_key", "admin_key", "database", "keys_file")
"""Settings that the chart takes under `secrets`."""

OF_BYTES = {
    "type": "string",
    "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(([kKmMgGtT][iI]?)?[bB])?\s*$",
}
ORIGIN = {"type": "string", "pattern": r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$"}
LOOPBACK = r"^\s*(127\.|::1\s*$|localhost)"
"""Where no probe of a kubelet arrives."""

_TAKEN = (
    "type",
    "enum",
    "minLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "additionalProperties",
)


def settings_schema() -> dict[str, Any]:
    """An object that has a property a setting and no others."""
    properties = {
        name: _property(name, field)
        for name, field in Settings.model_json_schema()["properties"].items()
        if name not in SECRET
    }
    properties["port"]["minimum"] = 1  # a service must know it
    properties["host"]["not"] = {"pattern": LOOPBACK}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(name: str, field: dict[str, Any]) -> dict[str, Any]:
    """What JSON schema can say of a setting. Leaves null out: a setting that is not given is not there."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    (kind,) = kinds
    said = {key: kind[key] for key in _TAKEN if key in kind}
    if "additionalProperties" in said:
        said["additionalProperties"] = {"type": "string", "minLength": 1}
    if kind.get("format") in ("path", "directory-path"):
        said["minLength"] = 1
    if name.endswith("_bytes"):
        said = {"anyOf": [{"type": "integer", "minimum": kind["ge"]}, OF_BYTES]}
    if name == "cors_origin":
        said["items"] = ORIGIN
    return {"description": field["description"], **said}


def main() -> None:
    """Write it."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
