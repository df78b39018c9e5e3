"""The workflows: a forge would take them, their actions are pinned, and what their steps run is there.

None has run on a forge yet. `make release` does what the build job does.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.command_lines import commands, problems

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
WORKFLOWS = sorted(WORKFLOW.parent.iterdir())
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        capture_output=True,
        text=True,
    )


def is_a_workflow(path: Path) -> bool:
    """Whether it is one by the schema of GitHub's workflows."""
    return (
        tool(
            "check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)
        ).returncode
        == 0
    )


def findings(path: Path) -> str:
    """What is dangerous in it, as far as that can be told without a network."""
    done = tool("zizmor", "--offline", "--no-progress", "--format", "plain", str(path))
    return "" if done.returncode == 0 else done.stdout


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = WORKFLOW.read_text("utf-8")
    assert old in text
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / "release.yml").write_text(text.replace(old, new))
    return folder / "release.yml"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_forge_would_take_it(workflow: Path) -> None:
    assert is_a_workflow(workflow)


@pytest.mark.parametrize(
    ("old", "new"), [("runs-on", "run-on"), ("needs: attest", "needs: 3"), ("steps:", "step:")]
)
def test_what_a_forge_would_refuse_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert not is_a_workflow(changed(tmp_path, old, new))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_nothing_in_it_is_dangerous(workflow: Path) -> None:
    assert findings(workflow) == ""


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("08c6903cd8c0fde910a37f88322edcfb5dd907a8", "v5", "unpinned-uses"),
        ('build/release "$TAG"', 'build/release "${{ github.ref_name }}"', "template-injection"),
        ("persist-credentials: false", "fetch-depth: 1", "artipacked"),
    ],
)
def test_what_is_dangerous_is_found(tmp_path: Path, old: str, new: str, finding: str) -> None:
    assert finding in findings(changed(tmp_path, old, new))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_with_its_version(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text("utf-8"))
    assert len(used) == {"nightly.yml": 5, "release.yml": 10}[workflow.name]
    assert [action for action in used if not PINNED.fullmatch(action)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_its_steps_run_is_there(workflow: Path) -> None:
    code = [
        step["run"] for step in steps(yaml.safe_load(workflow.read_text("utf-8"))) if "run" in step
    ]
    assert len(code) == {"nightly.yml": 4, "release.yml": 5}[workflow.name]
    for text in code:
        assert problems(text) == []
        for name, *_ in commands(text):
            if name.startswith(".ci/"):
                assert (ROOT / name).stat().st_mode & 0o111
                assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0
    if workflow == WORKFLOW:
        assert [words[0] for words in commands(code[0])] == [".ci/build-release"]


def test_what_is_attested_and_published_was_built_and_tested_before() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    assert [jobs[name].get("needs") for name in ("build", "test", "attest", "publish")] == [
        None,
        "build",
        ["build", "test"],
        "attest",
    ]
    writers = {name for name, job in jobs.items() if "write" in job["permissions"].values()}
    assert writers == {"attest", "publish"}
    assert "checkout" not in str(jobs["attest"]) + str(jobs["publish"])
