"""A stock vLLM with the built wheel installed beside it, as `server/docs/vllm.md` says to install it.

vLLM is the environment that `make bench-peers` makes and measures; it is left as it is. What a user adds
to it goes into a second environment that sees all of the first: the wheel without its dependencies,
and what the extra `vllm` names.
"""

import subprocess
import sys
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

from tests.bench.peers.environment import run
from tests.bench.peers.who.vllm import ENVIRONMENT, name_it_vllm, preloads, variables

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Overlay:
    """The interpreter that has all of it, and the variables that vLLM's CPU build is started with."""

    python: Path
    variables: dict[str, str]


def make_overlay(peers: Path, directory: Path) -> Overlay:
    """Make what is missing: vLLM below `peers`, and the overlay, anew, at `directory`."""
    ENVIRONMENT.make(peers)
    (beneath,) = ENVIRONMENT.directory(peers).glob("lib/python3*/site-packages")
    run([sys.executable, "-m", "venv", "--clear", str(directory)])
    (site_packages,) = directory.glob("lib/python3*/site-packages")
    (site_packages / "beneath.pth").write_text(f"{beneath}\n", encoding="utf-8")
    name_it_vllm(site_packages)
    python = directory / "bin" / "python"
    wheel = the_wheel()
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", str(wheel)])
    run([*pip, *extra(wheel, "vllm")])
    return Overlay(python, variables(preloads(ENVIRONMENT.directory(peers))))


def the_wheel() -> Path:
    """What `make` has built."""
    found = sorted((CHECKOUT / "dist").glob("*.whl"))
    if len(found) != 1:
        raise RuntimeError(f"one wheel in dist/ is needed, there are {len(found)}: make test-vllm")
    return found[0]


def extra(wheel: Path, name: str) -> list[str]:
    """The requirements that only this extra of a wheel has."""
    with ZipFile(wheel) as archive:
        (metadata,) = (path for path in archive.namelist() if path.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    requirements = map(Requirement, headers.get_all("Requires-Dist") or ())
    return [
        f"{requirement.name}{requirement.specifier}"
        for requirement in requirements
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": name})
        and not requirement.marker.evaluate({"extra": ""})
    ]


def installed(python: Path) -> str:
    """Names and versions of what an interpreter sees, a line each."""
    command = [str(python), "-m", "pip", "list", "--format", "freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
