"""The container that the chart renders, as a process on this machine.

What a kubelet and the image would do is done here: the image's variables and entrypoint, secrets and the
file of settings, and a directory for each volume. Paths below a mount become paths below `root`; the root
file system is not read only, and the user is whoever runs the tests.
"""

import base64
import math
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from dockerfile_parse import DockerfileParser

from server.config import Settings, load_settings
from tests.deploy.chart import manifests as look
from tests.deploy.chart.settings_schema import CHART

DOCKERFILE = CHART.parents[2] / "docker" / "Dockerfile"
ENTRYPOINT = DOCKERFILE.parent / "entrypoint"
ELSEWHERE = {"uri": "postgresql://fathom@database.example/fathom"}
"""Entries of Secrets that are not the chart's, where their text must be of a kind."""


def image_environment() -> dict[str, str]:
    """What the image sets for its processes: the ENV steps of the stage `runtime`."""
    found: dict[str, str] = {}
    stage = ""
    for step in DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes())).structure:
        if step["instruction"] == "FROM":
            stage = step["value"].split()[-1]
        elif step["instruction"] == "ENV" and stage == "runtime":
            found |= dict(word.split("=", 1) for word in shlex.split(step["value"]))
    return found


@dataclass(frozen=True, slots=True)
class Container:
    """What to run."""

    command: list[str]
    environ: dict[str, str]
    grace_s: int
    probes: dict[str, str]
    """Path by kind."""


def container(manifests: list[look.Manifest], root: Path) -> Container:
    """Make its volumes below `root`, and say how it is started."""
    pod, spec = look.pod_of(manifests)["spec"], look.container_of(manifests)
    mounts = {
        each["mountPath"]: root / each["mountPath"].lstrip("/") for each in spec["volumeMounts"]
    }
    for place in mounts.values():
        place.mkdir(parents=True, exist_ok=True)

    def mapped(text: str) -> str:
        pattern = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
        return re.sub(
            rf"(?<![\w/.-])({pattern})(?=/|\"|$)",
            lambda found: str(mounts[found[1]]),
            text,
            flags=re.M,
        )

    settings = mounts["/etc/fathom"] / "fathom.toml"
    settings.write_text(mapped(look.toml_of(manifests)), encoding="utf-8")
    for volume in pod["volumes"]:
        if volume["name"] == "keys":
            (item,) = volume["secret"]["items"]
            keys = _secret(manifests, volume["secret"]["secretName"], item["key"], '{"keys": []}')
            (mounts["/etc/fathom-keys"] / item["path"]).write_text(keys, encoding="utf-8")
    environ = {key: mapped(value) for key, value in image_environment().items()}
    for name, value in look.environment(spec).items():
        environ[name] = mapped(value) if isinstance(value, str) else _from(value, spec, manifests)
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
    environ["PATH"] = os.pathsep.join([scripts, os.environ["PATH"]])
    return Container(
        command=[str(ENTRYPOINT), *map(mapped, spec["args"])],
        environ=environ,
        grace_s=pod["terminationGracePeriodSeconds"],
        probes={
            kind: spec[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("startup", "readiness", "liveness")
        },
    )


def settings_of(manifests: list[look.Manifest], root: Path) -> Settings:
    """What the server would read. Raises ConfigError."""
    made = container(manifests, root)
    named = re.findall(
        rf'"({re.escape(str(root))}/[^"]*)"', Path(made.environ["FATHOM_CONFIG"]).read_text()
    )
    for path in named:  # in a cluster they are in the volumes
        Path(path).mkdir(parents=True, exist_ok=True)
    return load_settings(environ=made.environ)


def _from(source: Mapping[str, Any], spec: look.Manifest, manifests: list[look.Manifest]) -> str:
    """The text of a variable that comes from elsewhere."""
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        return _secret(manifests, reference["name"], reference["key"], "a-secret-of-theirs")
    if "resourceFieldRef" in source:
        limit = str(spec["resources"]["limits"]["cpu"])
        cores = float(limit[:-1]) / 1000 if limit.endswith("m") else float(limit)
        return str(math.ceil(cores))
    return yaml.safe_dump(source)


def _secret(manifests: list[look.Manifest], name: str, key: str, text: str) -> str:
    """An entry of the chart's Secret; `text` where it is another's."""
    for each in manifests:
        if each["kind"] == "Secret" and each["metadata"]["name"] == name:
            return base64.b64decode(each["data"][key]).decode()
    return ELSEWHERE.get(key, text)
