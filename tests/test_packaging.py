"""What users install: the wheel's content, the console script, and which torch comes with it.

`make test` installs the wheel and sets EXPECT_WHEEL; an editable checkout passes the rest.
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import boundary
import server
from tests import test_house as house

ROOT = Path(__file__).parents[1]
INSTALL_TORCH = ROOT / ".ci" / "install-torch"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DIST_INFO = f"fathom_lora-{server.__version__}.dist-info"

# pydantic-core is one release with pydantic.
OURS = {"fathom-lora", "pydantic-core"}

# An extra, torch's CUDA builds bring it, or vLLM is what imports this file: only there anything does.
OPTIONAL = {
    ("server/model/triton_attention.py", "triton"),
    ("server/model/triton_fetch.py", "triton"),
    ("server/model/triton_lora.py", "triton"),
    ("server/model/replay/triton_chain.py", "triton"),
    ("server/api/tracing.py", "opentelemetry"),
    ("server/model/quantization.py", "torchao"),
    *((f"server/bench/capacity/{name}.py", "simpy") for name in ("simulation", "replica")),
    *((f"server/vllm/{name}.py", "vllm") for name in ("plugin", "resolver", "live_names")),
}

wheel_only = pytest.mark.skipif(
    "EXPECT_WHEEL" not in os.environ, reason="`make test` sets it: what runs is the built wheel"
)


@wheel_only
@pytest.mark.parametrize("package", [server, boundary])
def test_imports_come_from_the_installed_wheel(package: object) -> None:
    path = Path(str(getattr(package, "__file__", None)))
    assert "site-packages" in path.parts
    assert not path.is_relative_to(ROOT / "server")


@wheel_only
def test_the_wheel_holds_what_it_should() -> None:
    files = {str(path) for path in distribution("fathom-lora").files or ()}
    assert "server/py.typed" in files
    assert "boundary/py.typed" in files
    assert f"{DIST_INFO}/licenses/LICENSE" in files
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for package in ("server", "boundary")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path for path in files if path.endswith(".py")} == on_disk
    tops = {path.partition("/")[0] for path in files}
    assert tops - {"..", "server", "boundary"} == {DIST_INFO}


@wheel_only
def test_every_import_is_a_declared_dependency() -> None:
    declared = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, distribution("fathom-lora").requires or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    sources = packages_distributions()
    undeclared = {
        name
        for path, tree in house.sources(ROOT)
        for name in (found.partition(".")[0] for found in house.imported(path, tree))
        if name not in sys.stdlib_module_names
        and (path, name) not in OPTIONAL
        and not {canonicalize_name(source) for source in sources.get(name, [])} & (declared | OURS)
    }
    assert undeclared == set()


@wheel_only
def test_the_wheel_holds_the_demo() -> None:
    files = {str(path) for path in distribution("fathom-lora").files or ()}
    assert "server/demo/data/model/model.safetensors" in files
    adapters = {path for path in files if path.endswith("/adapter_model.safetensors")}
    assert len(adapters) == 3


@wheel_only
def test_the_wheel_holds_the_console() -> None:
    assets = ROOT / "server" / "console" / "assets"
    on_disk = {path.relative_to(ROOT).as_posix() for path in assets.rglob("*") if path.is_file()}
    files = {str(path) for path in distribution("fathom-lora").files or ()}
    assert {path for path in files if path.startswith("server/console/assets/")} == on_disk
    assert "server/console/assets/vendor/preact.LICENSE.txt" in on_disk


@wheel_only
def test_the_wheel_holds_the_documents() -> None:
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for kind in ("*.md", "*.svg")
        for path in (ROOT / "server" / "docs").rglob(kind)
    }
    files = {str(path) for path in distribution("fathom-lora").files or ()}
    assert on_disk <= files
    assert {"server/docs/concepts.md", "server/docs/depth.svg"} <= on_disk


@wheel_only
@pytest.mark.parametrize("command", [["fathom"], ["python", "-m", "server"]])
def test_the_command_runs(command: list[str], tmp_path: Path) -> None:
    binary = str(Path(sys.executable).parent / command[0])
    done = subprocess.run(
        [binary, *command[1:], "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{server.__version__}\n", "")
    assert server.__version__ == distribution("fathom-lora").version


def test_help_needs_no_torch() -> None:
    code = "import server.cli, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_http_needs_no_torch() -> None:
    code = "import server.api.app, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@wheel_only
def test_pip_keeps_the_installed_torch() -> None:
    declared = map(Requirement, distribution("fathom-lora").requires or ())
    wanted = [f"torch{found.specifier}" for found in declared if found.name == "torch"]
    assert wanted == ["torch>=2.11", "torch==2.13.0"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


@wheel_only
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="one build there"
)
def test_a_machine_without_a_gpu_has_no_cuda_build() -> None:
    has_gpu = subprocess.run("nvidia-smi -L", shell=True, capture_output=True).returncode == 0
    assert (torch.version.cuda is not None) == has_gpu


@pytest.mark.parametrize(
    ("machine", "has_gpu", "pip_finds", "version", "expected"),
    [
        ("Linux x86_64", False, True, "", ["torch==2.13.0+cpu"]),
        ("Linux x86_64", False, True, "2.12.0", ["torch==2.12.0+cpu"]),
        (
            "Linux x86_64",
            False,
            False,
            "",
            ["torch==2.13.0+cpu", f"torch==2.13.0+cpu --extra-index-url {CPU_INDEX}"],
        ),
        ("Linux x86_64", True, True, "", ["torch!=2.13.0+cpu"]),
        ("Linux x86_64", True, True, "2.12.0", ["torch==2.12.0,!=2.12.0+cpu"]),
        ("Linux aarch64", False, True, "", ["torch"]),
        ("Darwin arm64", False, True, "2.12.0", ["torch==2.12.0"]),
    ],
)
def test_torch_fits_the_machine(
    tmp_path: Path,
    machine: str,
    has_gpu: bool,
    pip_finds: bool,
    version: str,
    expected: list[str],
) -> None:
    log = tmp_path / "log"
    system, processor = machine.split()
    fakes = {
        "nvidia-smi": f"exit {0 if has_gpu else 9}",
        "uname": f'case "$1" in -s) echo {system};; -m) echo {processor};; esac',
        # The last arguments are what is installed; only a named index has it if pip finds nothing.
        "python": f'shift 5; echo "$*" >> {log}; [ {int(pip_finds)} = 1 ] || [ $# -gt 1 ]',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = [str(INSTALL_TORCH), str(tmp_path / "python"), *([version] if version else [])]
    subprocess.run(arguments, check=True, env={"PATH": path})
    assert log.read_text().splitlines() == expected
