"""The commands from their flags to a table and a file; and one real server beside its prediction."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.bench.capacity import __main__ as commands
from server.bench.capacity import planning
from server.bench.capacity.page import rewritten, tables
from server.bench.capacity.timed_steps import Prefill, StepTimer
from server.config import ConfigError
from tests.tiny import Tiny, open_tiny

DEPLOY = Path(__file__).parents[3] / "deploy"
TINY = "2x32:vocab=100:positions=1100"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        commands.main(list(arguments))
    return int(ended.value.code or 0)


def test_the_pages_tables_are_what_the_findings_say() -> None:
    page = (DEPLOY / "CAPACITY.md").read_text(encoding="utf-8")
    makers = tables(DEPLOY / "capacity")
    assert rewritten(page, makers) == page
    assert rewritten(page.replace("| a decoding row | ", "| a decoding row | 1"), makers) == page
    with pytest.raises(ConfigError, match="should have the tables"):
        rewritten(page.replace("table: memory", "table: memoirs"), makers)


@pytest.mark.slow
def test_the_h200s_plan_is_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the page, searched for again."""
    published = json.loads((DEPLOY / "capacity" / "plan-h200.json").read_text())["findings"]
    monkeypatch.setattr(commands, "cases", lambda demand: planning.cases(demand)[3:4])
    assert run("plan", "--h200", "--json", str(tmp_path / "plan.json")) == 0
    (found,) = json.loads((tmp_path / "plan.json").read_text())["findings"]
    assert found["case"]["routing"] == "affinity"
    assert found == published[3]


def test_what_replicas_are_has_to_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan") == 2
    assert "either --costs or --h200" in capsys.readouterr().err


def test_costs_from_elsewhere_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"findings": {"model": "x"}}')
    assert run("plan", "--costs", str(path)) == 2
    assert "nothing that `measure` wrote" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the system has to count a thread's time")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_answers_what_was_asked_of_it_on_paper(tmp_path: Path) -> None:
    """Both sides answer the same requests; how long they took is nobody's business here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> dict[str, Any]:
        path = tmp_path / f"{arguments[0]}.json"
        subprocess.run(
            [sys.executable, "-m", "server.bench.capacity", *arguments, "--json", str(path)],
            check=True,
            env=environment,
            timeout=900,
        )
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    command("measure", "--random-model", TINY, "--rounds", "1")
    compared = command(
        "compare", str(tmp_path / "measure.json"), "--random-model", TINY, "--num-adapters", "4",
        "--num-adapters", "12", "--loads", "0.2", "--duration-s", "2", "--rounds", "1",
    )  # fmt: skip
    few, many = compared["findings"]
    assert (few["cell"]["num_adapters"], many["cell"]["num_adapters"]) == (4, 12)
    for run in (few, many):
        measured, predicted = run["measured"], run["predicted"]
        assert measured["num_failed"] == predicted["num_failed"] == 0
        assert measured["num_answered"] == predicted["num_answered"] > 0
        assert measured["num_steps"] > 0
        assert 0 <= measured["slot_hit_rate"] <= 1
    assert many["measured"]["slot_hit_rate"] < few["measured"]["slot_hit_rate"]


def test_a_prompt_ends_though_its_adapter_came_in_with_it(tiny: Tiny) -> None:
    """Steps in which an adapter comes in are not kept, and nobody waits for their tokens."""
    with open_tiny(tiny, "a", prefix_caching=False) as core:
        timer = StepTimer(core, 0)
        cold = timer.prefill(Prefill(40, 0, 1), ["a"])
        warm = timer.prefill(Prefill(40, 0, 1), ["a"])
    assert [step.shape.prefill_tokens for step in cold] == [16, 8]
    assert [step.shape.prefill_tokens for step in warm] == [16, 16, 8]
