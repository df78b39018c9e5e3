"""The house holds: imports point one way, and the README's tree is what lies on the disk.

Both are read from the source alone. Each rule is also shown to fail on a tree that breaks it.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The console is files: it asks the routes over HTTP, and is given nothing of the server itself.
NOT_OF_THE_PAGE = ("access", "api", "calibration", "config", "engine", "model")

# In this part of the tree, these are never imported, not even for type checking.
FORBIDDEN = {
    "server/access": ("torch", "server.api", "server.calibration", "server.model"),
    "server/api": ("torch", "server.model"),
    "server/calibration": ("torch", "server.api", "server.model"),
    "server/engine": ("server.access", "server.api", "server.calibration"),
    "server/model": (
        "server.access",
        "server.api",
        "server.calibration",
        "server.engine",
        "server.sources",
    ),
    "server/sources": (
        "torch",
        "server.access",
        "server.api",
        "server.calibration",
        "server.engine",
    ),
    "server/console": ("torch", "boundary", *(f"server.{part}" for part in NOT_OF_THE_PAGE)),
    # Installed in vLLM's environment, without what only a server needs.
    "server/vllm": (
        "torch",
        "structlog",
        *(f"server.{part}" for part in ("access", "api", "calibration", "engine", "logs")),
    ),
    "boundary": ("server",),
}

# Tensors live in the model and the sampler. Beside them: a library that is given a model, scripts
# that train one, benchmarks, and the report on what torch finds on this machine.
MAY_IMPORT_TORCH = (
    "boundary/",
    "server/bench/",
    "server/demo/",
    "server/doctor.py",
    "server/engine/logprobs.py",
    "server/engine/sampler.py",
    "server/model/",
)

READS_ENVIRONMENT = "server/environment.py"


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every module of both packages, by its path from the root."""
    for package in ("server", "boundary"):
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a module imports; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def wrong_arrows(root: Path) -> set[tuple[str, str]]:
    """`(file, module)` for every import that a rule forbids."""
    return {
        (path, module)
        for path, tree in sources(root)
        for part, modules in FORBIDDEN.items()
        if path.startswith(part + "/")
        for module in modules
        if any(is_within(name, module) for name in imported(path, tree))
    }


def stray_torch(root: Path) -> set[str]:
    """Files that import torch where no tensors belong."""
    return {
        path
        for path, tree in sources(root)
        if not path.startswith(MAY_IMPORT_TORCH)
        and any(is_within(name, "torch") for name in imported(path, tree))
    }


def environment_readers(root: Path) -> set[str]:
    """Files that read environment variables."""
    return {
        path
        for path, tree in sources(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
        in ("environ", "environb", "getenv")
    }


def documented(readme: str) -> dict[str, str]:
    """Path -> purpose, from the fenced block whose first line begins with `server/`."""
    (block,) = re.findall(r"^```text\n(server/.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S+)(?: +(\S.*))?", line)
        assert match, f"the tree has a line that is neither a file nor a folder: {line!r}"
        indent, name, purpose = match.groups()
        del folders[len(indent) // 2 :]
        path = "".join([*folders, name])
        assert path not in found, f"the tree has {path} twice"
        found[path] = purpose or ""
        if name.endswith("/"):
            folders.append(name)
    return found


def on_disk(root: Path) -> set[str]:
    """Every module but `__init__.py`, whose purpose is its folder's."""
    return {path for path, _ in sources(root) if not path.endswith("__init__.py")}


def plant(root: Path, files: Iterable[tuple[str, str]]) -> Path:
    for path, text in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_arrows_point_one_way() -> None:
    assert wrong_arrows(ROOT) == set()


@pytest.mark.parametrize(
    ("path", "line", "module"),
    [
        ("server/engine/core.py", "from server.api import app", "server.api"),
        ("server/engine/core.py", "from server import api", "server.api"),
        ("server/engine/core.py", "from ..api.app import create_app", "server.api"),
        ("server/engine/core.py", "from .. import api", "server.api"),
        ("server/model/lora.py", "import server.api.app", "server.api"),
        ("server/model/lora.py", "def f():\n    import server.engine.core", "server.engine"),
        ("boundary/sweep.py", "if TYPE_CHECKING:\n    from server import model", "server"),
        ("boundary/sweep.py", "importlib.import_module('server.model')", "server"),
        ("server/api/app.py", "import torch.nn as nn", "torch"),
        ("server/calibration/jobs.py", "import torch", "torch"),
        ("server/access/ledger.py", "from server.api import app", "server.api"),
        ("server/engine/core.py", "from server.access import ledger", "server.access"),
        ("server/calibration/jobs.py", "from server.api import app", "server.api"),
        ("server/calibration/jobs.py", "from server.model import lora", "server.model"),
        ("server/engine/core.py", "from server import calibration", "server.calibration"),
        ("server/model/lora.py", "import server.calibration.jobs", "server.calibration"),
        ("server/api/app.py", "from server.model.lora import LoraHooks", "server.model"),
        ("server/console/router.py", "from server.api import auth", "server.api"),
        ("server/console/router.py", "from server.config import Settings", "server.config"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, path: str, line: str, module: str) -> None:
    assert wrong_arrows(plant(tmp_path, [(path, line)])) == {(path, module)}


def test_a_name_that_only_begins_alike_is_no_arrow(tmp_path: Path) -> None:
    files = [
        ("server/api/app.py", "import torchvision, server.models"),
        ("boundary/a.py", "import servers"),
    ]
    assert wrong_arrows(plant(tmp_path, files)) == set()


def test_torch_stays_with_the_tensors() -> None:
    assert stray_torch(ROOT) == set()


def test_stray_torch_is_found(tmp_path: Path) -> None:
    files = [
        ("server/engine/scheduler.py", "from torch import Tensor"),
        ("server/engine/sampler.py", "import torch"),
        ("server/model/lora.py", "import torch"),
        ("server/cli.py", "import torchaudio"),
    ]
    assert stray_torch(plant(tmp_path, files)) == {"server/engine/scheduler.py"}


def test_one_file_reads_the_environment() -> None:
    assert environment_readers(ROOT) == {READS_ENVIRONMENT}


def test_a_second_reader_is_found(tmp_path: Path) -> None:
    files = [
        ("server/a.py", "import os\nos.environ['X']"),
        ("server/b.py", "from os import getenv"),
        ("boundary/c.py", "print('environ')"),
    ]
    assert environment_readers(plant(tmp_path, files)) == {"server/a.py", "server/b.py"}


def test_no_file_is_named_for_being_useful() -> None:
    names = {Path(path).stem for path, _ in sources(ROOT)}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_the_readme_tree_is_the_disk() -> None:
    tree = documented((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {path for path in tree if path.endswith(".py")} == on_disk(ROOT)
    for path in tree:
        assert (ROOT / path).exists(), f"the README's tree names {path}, which is not there"


def test_every_entry_of_the_tree_has_a_purpose_of_its_own() -> None:
    tree = documented((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [path for path, purpose in tree.items() if not purpose] == []
    assert len(set(tree.values())) == len(tree)


def test_a_tree_that_differs_from_the_disk_is_found(tmp_path: Path) -> None:
    lines = ("server/      all", "  engine/    steps", "    core.py  loop", "  cli.py  flags")
    readme = "\n".join(["# Title", "```text", *lines, "```", ""])
    tree = documented(readme)
    assert tree == {
        "server/": "all",
        "server/engine/": "steps",
        "server/engine/core.py": "loop",
        "server/cli.py": "flags",
    }
    files = [
        ("server/engine/core.py", ""),
        ("server/engine/__init__.py", ""),
        ("server/new.py", ""),
    ]
    assert on_disk(plant(tmp_path, files)) == {"server/engine/core.py", "server/new.py"}
    with pytest.raises(AssertionError, match="twice"):
        documented("```text\nserver/  all\n  a.py  b\n  a.py  c\n```\n")
