"""The images' description agrees with the tree, the package and the pins; `make test-docker` builds them.

Each rule that reads files is also shown to fail on a file that breaks it.
"""

import os
import re
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.config import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE_FILES = ("compose.yaml", "compose.cuda.yaml")
NOT_IN_CPU = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
HADOLINT = Path(sysconfig.get_path("scripts"), "hadolint")

# The image of a Linux machine; the locks also serve newer Pythons.
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
PYTHONS = ("3.11", "3.12", "3.13")


def copied(dockerfile: str) -> Iterator[str]:
    """What the build takes out of the checkout."""
    parser = DockerfileParser(fileobj=_Memory(dockerfile))
    for step in parser.structure:
        words = step["value"].split()
        if step["instruction"] == "COPY" and not any(w.startswith("--from=") for w in words):
            yield from [word for word in words if not word.startswith("--")][:-1]


def let_through(dockerignore: str) -> set[str]:
    lines = [line for line in dockerignore.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is left out, and then some of it is not"
    return {line[1:] for line in lines if line.startswith("!")}


class _Memory:
    """A file for DockerfileParser, which otherwise wants a directory."""

    def __init__(self, text: str) -> None:
        self._lines = text.encode().splitlines(keepends=True)

    def seek(self, offset: int) -> None:
        assert offset == 0

    def readlines(self) -> list[bytes]:
        return self._lines


def pins(lock: str) -> list[Requirement]:
    """Every pin of a lock file. Raises AssertionError for one that is no exact version with a hash."""
    found = []
    for block in re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", lock, flags=re.MULTILINE)):
        requirement, *hashes = block.replace("\\\n", "\n").strip().splitlines()
        pin = Requirement(requirement.strip())
        assert [specifier.operator for specifier in pin.specifier] == ["=="], requirement
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64} *", line) for line in hashes), block
        found.append(pin)
    return found


def unmet(requirements: list[str], lock: str, python: str) -> list[str]:
    """Requirements that no pin, or a pin of another version, answers on Linux with this Python."""
    where = LINUX | {"python_version": python, "python_full_version": f"{python}.0"}
    pinned = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins(lock)
        if pin.marker is None or pin.marker.evaluate(where)
    }
    wanted = [Requirement(text) for text in requirements]
    return [
        str(requirement)
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate(where)
        if (name := canonicalize_name(requirement.name)) not in pinned
        or not requirement.specifier.contains(pinned[name])
    ]


def read(lock: str) -> str:
    return (DOCKER / "locks" / lock).read_text()


def shipped() -> list[str]:
    extras = PYPROJECT["project"]["optional-dependencies"]
    return [
        *PYPROJECT["project"]["dependencies"],
        *extras["otel"],
        *extras["postgres"],
        *extras["s3"],
    ]


def compose(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((DOCKER / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def mounted(file: dict[str, Any]) -> list[str]:
    """What services are given, files of the checkout and volumes' names."""
    volumes = [v for service in file["services"].values() for v in service.get("volumes", ())]
    return [volume.partition(":")[0] for volume in volumes]


def hadolint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HADOLINT, "-"], input=dockerfile, capture_output=True, text=True, check=False, timeout=60
    )


def test_hadolint_finds_nothing() -> None:
    result = hadolint(DOCKERFILE)
    assert (result.returncode, result.stdout) == (0, "")


def test_hadolint_finds_a_build_that_ends_as_root() -> None:
    result = hadolint(DOCKERFILE + "USER root\n")
    assert result.returncode != 0
    assert "DL3002" in result.stdout


def test_the_build_takes_what_is_there_and_not_left_out() -> None:
    sources = set(copied(DOCKERFILE))
    assert {path for path in sources if not (ROOT / path).exists()} == set()
    passes = let_through(IGNORED)
    assert {path for path in passes if not (ROOT / path).exists()} == set()
    assert {p for p in sources if not any(p == q or p.startswith(f"{q}/") for q in passes)} == set()
    assert {q for q in passes if not any(p == q or p.startswith(f"{q}/") for p in sources)} == set()


def test_a_source_that_is_copied_is_seen() -> None:
    assert list(copied("FROM a\nCOPY --chmod=0755 x y/ z/\nCOPY --from=b c d\n")) == ["x", "y/"]


def test_the_user_is_a_number_and_the_settings_exist() -> None:
    steps = DockerfileParser(fileobj=_Memory(DOCKERFILE)).structure
    users = [step["value"] for step in steps if step["instruction"] == "USER"]
    assert users[-1] == "10001:10001"
    assert all(re.fullmatch(r"\d+:\d+", user) for user in users)
    named = set(re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)", DOCKERFILE))
    for name in COMPOSE_FILES:
        environment = compose(name)["services"]["fathom"].get("environment", {})
        named |= {key.removeprefix(ENV_PREFIX) for key in environment}
    assert {"HOST", "PORT", "API_KEY", "DATABASE"} <= named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_torch_is_the_release_that_is_tested() -> None:
    (tested,) = re.findall(r"^TORCH_TESTED := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"^ARG TORCH_VERSION=(\S+)$", DOCKERFILE, re.M) == [tested]
    assert [str(pin) for pin in pins(read("cuda.txt")) if pin.name == "torch"] == [
        f"torch=={tested}"
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_answer_what_the_package_requires(python: str) -> None:
    assert unmet(shipped(), read("cuda.txt"), python) == []
    assert unmet(shipped(), read("cpu.txt"), python) == ["torch>=2.11"]
    assert unmet(PYPROJECT["build-system"]["requires"], read("build.txt"), python) == []


def test_the_cpu_image_differs_by_torch_and_its_libraries_alone() -> None:
    everything = [str(pin) for pin in pins(read("cuda.txt")) if not NOT_IN_CPU.fullmatch(pin.name)]
    assert [str(pin) for pin in pins(read("cpu.txt"))] == everything


def test_a_pin_that_is_old_or_open_is_found() -> None:
    lock = f"# made\na==1.0 \\\n    --hash=sha256:{'0' * 64}\n"
    assert unmet(["a>=1"], lock, "3.11") == []
    assert unmet(["a>=2", "b"], lock, "3.11") == ["a>=2", "b"]
    for broken in (
        lock.replace("==", ">="),
        lock.partition(" \\")[0],
        lock.replace("sha256", "md5"),
    ):
        with pytest.raises(AssertionError):
            pins(broken)


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_are_what_the_specification_says(name: str) -> None:
    PyCompose.from_yaml((DOCKER / name).read_text()).validate()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("read_only: true", "read_only: perhaps"),
        ("condition: service_healthy", "condition: service_well"),
        ("read_only: true", "read_onyl: true"),
    ],
)
def test_a_compose_file_that_says_else_is_found(good: str, bad: str) -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert good in text
    with pytest.raises(ValueError, match=r"."):
        PyCompose.from_yaml(text.replace(good, bad)).validate()


def test_profiles_add_to_the_server_alone() -> None:
    services = compose("compose.yaml")["services"]
    profiles = {name: tuple(service.get("profiles", ())) for name, service in services.items()}
    assert profiles == {
        "fathom": (),
        "postgres": ("postgres",),
        "prometheus": ("watch",),
        "grafana": ("watch",),
    }


def test_compose_names_files_and_stages_that_are_there() -> None:
    file = compose("compose.yaml")
    sources = mounted(file)
    assert {source for source in sources if not source.startswith(".")} == set(file["volumes"])
    files = [DOCKER / source for source in sources if source.startswith(".")]
    assert len(files) == 4
    assert [path for path in files if not path.is_file()] == []
    for name in COMPOSE_FILES:
        build = compose(name)["services"]["fathom"]["build"]
        assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.M)


def test_prometheus_scrapes_as_the_dashboard_asks() -> None:
    (asked,) = re.findall(
        r"^   ```yaml\n(.*?)^   ```", (ROOT / "deploy/grafana/README.md").read_text(), re.M | re.S
    )
    assert compose("prometheus.yml") == yaml.safe_load(re.sub(r"^   ", "", asked, flags=re.M))


@pytest.fixture
def entrypoint(tmp_path: Path) -> Any:
    """Runs the entrypoint with a `fathom` that says how it was called."""
    fathom = tmp_path / "fathom"
    fathom.write_text('#!/bin/sh\necho "$* key=${FATHOM_API_KEY-none}"\n')
    fathom.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("scripts"), os.environ["PATH"]])

    def run(*arguments: str, **environment: str) -> tuple[str, str]:
        result = subprocess.run(
            [DOCKER / "entrypoint", *arguments],
            env={"PATH": path} | environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return result.stdout.strip(), result.stderr

    return run


@pytest.mark.parametrize("arguments", [("serve",), (), ("--max-num-seqs", "4")])
def test_a_key_is_made_where_nothing_is_said_of_keys(
    entrypoint: Any, arguments: tuple[str]
) -> None:
    out, err = entrypoint(*arguments)
    (key,) = re.findall(r"^export FATHOM_API_KEY=(\S{32})$", err, re.M)
    options = " ".join(arguments).removeprefix("serve")
    assert out == f"serve {options}".strip() + f" key={key}"
    assert entrypoint(*arguments)[1] != err


@pytest.mark.parametrize(
    ("arguments", "environment", "called"),
    [
        (("serve",), {"FATHOM_API_KEY": "k"}, "serve key=k"),
        (("serve",), {"FATHOM_ADMIN_KEY": "k"}, "serve key=none"),
        (("serve",), {"FATHOM_KEYS_FILE": "f"}, "serve key=none"),
        (("serve",), {"FATHOM_DATABASE": "d"}, "serve key=none"),
        (("serve",), {"FATHOM_CONFIG": "c"}, "serve key=none"),
        (("serve",), {"FATHOM_INSECURE": "true"}, "serve key=none"),
        (("serve", "--insecure"), {}, "serve --insecure key=none"),
        (("--api-key=k",), {}, "serve --api-key=k key=none"),
        (("serve", "m", "--keys-file", "f"), {}, "serve m --keys-file f key=none"),
        (("--help",), {}, "--help key=none"),
        (("--version",), {}, "--version key=none"),
        (("doctor", "--json"), {}, "doctor --json key=none"),
    ],
)
def test_no_key_is_made_otherwise(
    entrypoint: Any, arguments: tuple[str], environment: dict[str, str], called: str
) -> None:
    assert entrypoint(*arguments, **environment) == (called, "")
