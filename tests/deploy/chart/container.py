"""The container that the chart renders, as a kubelet would set it up; and as a process on this machine.

`variables` and `filled` do a kubelet's part: secrets, settings, a directory a volume. `container` does the
image's as well, its variables and entrypoint, and turns paths below a mount into paths below `root`. Its root
file system is not read only, and its user is whoever runs the tests: for these there is `in_image`.
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

from server.config import Settings
from server.environment import load_settings
from tests.deploy.chart import manifests as look
from tests.deploy.chart.settings_schema import CHART

DOCKERFILE = CHART.parents[2] / "docker" / "Dockerfile"
ENTRYPOINT = DOCKERFILE.parent / "entrypoint"
PROBES = ("startup", "readiness", "liveness")
ELSEWHERE = {"uri": "postgresql://fathom@database.example/fathom"}
"""Entries of Secrets that are not the chart's, where their text must be of a kind."""


@dataclass(frozen=True, slots=True)
class Container:
    """A process to run."""

    command: list[str]
    environ: dict[str, str]
    grace_s: int
    probes: dict[str, str]
    """Path by kind."""


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


def variables(manifests: list[look.Manifest]) -> dict[str, str]:
    """What the pod sets for it."""
    spec = look.container_of(manifests)
    return {
        name: value if isinstance(value, str) else _from(value, spec, manifests)
        for name, value in look.environment(spec).items()
    }


def probes(manifests: list[look.Manifest]) -> dict[str, str]:
    """Path by kind."""
    spec = look.container_of(manifests)
    return {kind: spec[f"{kind}Probe"]["httpGet"]["path"] for kind in PROBES}


def filled(manifests: list[look.Manifest], root: Path) -> dict[str, Path]:
    """Make each volume a directory below `root`, with what it holds at the start; by where it is mounted."""
    mounts = {
        each["mountPath"]: root / each["mountPath"].lstrip("/")
        for each in look.container_of(manifests)["volumeMounts"]
    }
    for place in mounts.values():
        place.mkdir(parents=True, exist_ok=True)
    settings = mounts["/etc/fathom"] / "fathom.toml"
    settings.write_text(look.toml_of(manifests), encoding="utf-8")
    for volume in look.pod_of(manifests)["spec"]["volumes"]:
        if volume["name"] == "keys":
            (item,) = volume["secret"]["items"]
            keys = _secret(manifests, volume["secret"]["secretName"], item["key"], '{"keys": []}')
            (mounts["/etc/fathom-keys"] / item["path"]).write_text(keys, encoding="utf-8")
    return mounts


def container(manifests: list[look.Manifest], root: Path) -> Container:
    """The process, with its volumes below `root`."""
    mounts = filled(manifests, root)
    pattern = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
    of_a_mount = re.compile(rf'(?<![\w/.-])({pattern})(?=/|"|$)', re.MULTILINE)

    def mapped(text: str) -> str:
        return of_a_mount.sub(lambda found: str(mounts[found[1]]), text)

    settings = mounts["/etc/fathom"] / "fathom.toml"
    settings.write_text(mapped(settings.read_text(encoding="utf-8")), encoding="utf-8")
    given = variables(manifests)
    from_elsewhere = {
        key: given[key]
        for key, value in look.environment(look.container_of(manifests)).items()
        if not isinstance(value, str)
    }
    environ = {key: mapped(value) for key, value in (image_environment() | given).items()}
    environ |= from_elsewhere  # a secret's text is taken as it is
    scripts = (sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ["PATH"])
    environ["PATH"] = os.pathsep.join(scripts)
    return Container(
        command=[str(ENTRYPOINT), *map(mapped, look.container_of(manifests)["args"])],
        environ=environ,
        grace_s=look.pod_of(manifests)["spec"]["terminationGracePeriodSeconds"],
        probes=probes(manifests),
    )


def settings_of(manifests: list[look.Manifest], root: Path) -> Settings:
    """What the server would read. Raises ConfigError."""
    environ = container(manifests, root).environ
    written = Path(environ["FATHOM_CONFIG"]).read_text(encoding="utf-8")
    for path in re.findall(rf'"({re.escape(str(root))}/[^"]*)"', written):
        Path(path).mkdir(parents=True, exist_ok=True)  # in a cluster it is on the volume
    return load_settings(environ=environ)


def _from(source: Mapping[str, Any], spec: look.Manifest, manifests: list[look.Manifest]) -> str:
    """The text of a variable that comes from elsewhere."""
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        return _secret(manifests, reference["name"], reference["key"], "a-secret-of-theirs")
    if "resourceFieldRef" in source:
        kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
        share = str(spec["resources"][kind][resource])
        cores = float(share[:-1]) / 1000 if share.endswith("m") else float(share)
        return str(math.ceil(cores))
    return yaml.safe_dump(source)


def _secret(manifests: list[look.Manifest], name: str, key: str, text: str) -> str:
    """An entry of the chart's Secret; `text` where it is another's."""
    for each in manifests:
        if each["kind"] == "Secret" and each["metadata"]["name"] == name:
            return base64.b64decode(each["data"][key]).decode()
    return ELSEWHERE.get(key, text)
