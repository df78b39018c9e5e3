"""Hatch's build hook: compiles `server/model/native` into the wheel, one library an instruction set.

Takes the machine's C compiler ($CC, cc, gcc or clang), or where there is none `ziglang` from the package
index, which pip installs into the build's own environment. Where nothing compiles, the wheel is pure
Python and says so when it serves. An editable install gets the libraries beside their sources.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCES = Path("server", "model", "native")
X86_LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")
# Fused multiply-adds wherever the processor has them, and no accounting for errno or traps: the
# kernels look at neither. Nothing that would let NaN be forgotten.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)


class KernelsHook(BuildHookInterface):
    """Called by hatchling when it builds a wheel, editable ones included."""

    def dependencies(self) -> list[str]:
        """What the build's environment needs beside hatchling."""
        return [] if system_compiler() else ["ziglang>=0.13"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and add what came of it."""
        root = Path(self.root)
        target = root / SOURCES if version == "editable" else Path(tempfile.mkdtemp())
        compiler = system_compiler() or [sys.executable, "-m", "ziglang", "cc"]
        try:
            libraries = list(compile_all(compiler, root / SOURCES, target))
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"no kernels are compiled, torch's operators will do: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(iter(platform_tags()))}"
        if version != "editable":
            for library in libraries:
                build_data["force_include"][str(library)] = str(SOURCES / library.name)


def system_compiler() -> list[str] | None:
    """The machine's own C compiler as a command, if it has one."""
    named = os.environ.get("CC")
    candidates = [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def compile_all(compiler: list[str], sources: Path, target: Path) -> Iterator[Path]:
    """One library a level. Raises OSError or CalledProcessError."""
    machine = platform.machine().lower()
    is_x86 = machine in ("x86_64", "amd64")
    for level in X86_LEVELS if is_x86 else (machine,):
        library = target / f"kernels-{level}.so"
        # zig spells levels with underscores.
        is_zig = "ziglang" in compiler
        march = [f"-march={level.replace('-', '_') if is_zig else level}"] if is_x86 else []
        command = [*compiler, *FLAGS, *march, "-fPIC", "-shared", "-o", str(library)]
        subprocess.run([*command, *map(str, sorted(sources.glob("*.c"))), "-lm"], check=True)
        yield library
