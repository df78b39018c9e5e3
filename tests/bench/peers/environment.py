"""A peer's own virtual environment, made by pip where it is missing.

Every environment begins with the torch of Fathom's own tests, which pip is told again beside the
peer's requirements: otherwise one of them would bring a CUDA build of several gigabytes. What a peer
requires and cannot load beside that torch is removed after.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers.progress import say

TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Environment:
    """Distributions with pinned versions. `removed` are uninstalled once the rest is there."""

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()

    def directory(self, root: Path) -> Path:
        """Where it lies under the bench's output."""
        return root / "env" / self.name

    def python(self, root: Path) -> Path:
        """Its interpreter."""
        return self.directory(root) / "bin" / "python"

    @property
    def recipe(self) -> dict[str, list[str]]:
        """What it is made of; another recipe is another environment."""
        return {"requirements": [TORCH, *self.requirements], "removed": list(self.removed)}

    def make(self, root: Path) -> Path:
        """Install what is missing and give the interpreter. Raises CalledProcessError."""
        directory, python = self.directory(root), self.python(root)
        stamp = directory / "recipe.json"
        if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == self.recipe:
            return python
        say(f"making the environment {self.name}")
        run([sys.executable, "-m", "venv", "--clear", str(directory)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, TORCH])
        if self.requirements:
            run([*pip, TORCH, *self.requirements])
        if self.removed:
            run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *self.removed])
        stamp.write_text(json.dumps(self.recipe), encoding="utf-8")
        return python


def run(command: list[str], **kept: object) -> None:
    """Run to the end and raise CalledProcessError, whose text has the last lines that it printed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kept
    )  # type: ignore[call-overload]
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        say(f"{' '.join(command)}\n{last}")
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
