"""The whole command on a CPU, and that its comparisons can fail.

`tests/model/tape.py` stands for CUDA graphs, which a CPU has not.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.bench.gpu import __main__ as command
from server.bench.gpu import agreement
from server.bench.gpu.agreement import Agreement, graph_agreement, kernel_agreements
from server.bench.gpu.report import BASE, CONTINUOUS, MIXED, ONE, PEFT, GpuReport
from server.model.gathered_kernel import Rows, TorchKernel
from server.model.stacks import SharedInput
from tests.model.tape import TapeRecorder
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny, open_tiny

CPU = torch.device("cpu")
TINY = [
    "--shape", "4x32:vocab=100", "--dtype", "float32", "--device", "cpu", "--num-adapters", "3",
    "--rank", "4", "--streams", "4", "--prompt-len", "6", "--steps", "4", "--rounds", "2",
    "--copy-bytes", "100000",
]  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], process_as_it_was: None
) -> Run:
    """Run the command in this process; returns status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_the_whole_command(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    status, out, err = run(*TINY, "--json", str(path))
    assert status == 0, err
    report = json.loads(path.read_text())
    assert list(report["rates"]) == [ONE, BASE, MIXED, PEFT, CONTINUOUS]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in report["rates"].values())
    assert [target["verdict"] in ("met", "missed") for target in report["targets"]] == [True] * 4
    assert report["check"]["is_passed"]
    assert [each["is_passed"] for each in report["agreements"]] == [True] * 3
    assert report["facts"]["recorded"] == "no"
    assert report["facts"]["depths"] == "1/2/3/4"
    for text in ("agrees", "check passed against peft", "over PEFT's mixed batch"):
        assert text in out


def test_parts_are_run_alone(run: Run) -> None:
    status, out, _ = run(*TINY, "--parts", "speed")
    assert status == 0
    assert "streams, mixed" in out
    assert "agrees" not in out
    assert "over PEFT's mixed batch: - (target 10) not measured" in out


def test_a_kernel_that_is_wrong_ends_with_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_baselines", lambda *_: [None])
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(TorchKernel, "expand", lambda *_: None)
    status, out, _ = run(*TINY, "--parts", "check")
    assert status == 1
    assert "DIFFERS" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--shape", "nonsense"], "LAYERSxHIDDEN"), (["--steps", "0"], "steps")],
)
def test_a_mistake_ends_with_2(run: Run, arguments: list[str], reason: str) -> None:
    status, _, err = run("--device", "cpu", *arguments)
    assert status == 2
    assert reason in err


def test_every_kernel_is_compared_with_every_kind_of_row() -> None:
    found = list(kernel_agreements(CPU, (24, 40)))
    assert [each.num_compared for each in found] == [24] * 3
    assert all(each.is_passed for each in found)
    assert not Agreement("nothing", 0.0, 1.0, 0).is_passed
    assert not Agreement("not a number", float("nan"), 1.0, 3).is_passed


@pytest.mark.parametrize("broken", ["gain", "scaling", "rank"])
def test_a_kernel_without_a_part_of_the_formula_differs(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SharedInput.put

    def put_and_break(self: SharedInput, index: int, slot: int, lora) -> bool:
        moved = put(self, index, slot, lora)
        up = self.modules[index].up
        assert up is not None
        if broken == "gain" and up.gain is not None:
            up.gain.fill_(1.0)
        if broken == "scaling":
            up.scaling[0, slot] *= 1.05
        if broken == "rank":
            self.down.lora_A[index, slot, lora.lora_A.shape[0] - 1] = 0
        return moved

    monkeypatch.setattr(SharedInput, "put", put_and_break)
    assert not any(each.is_passed for each in kernel_agreements(CPU, (24,)))


@pytest.fixture
def recorded(tiny: Tiny) -> Iterator[Callable[[], Agreement]]:
    """Compares an engine's recordings with its steps."""
    with open_tiny(tiny, "a", "b", recorder=TapeRecorder()) as core:

        def compare() -> Agreement:
            adapters = [(-1, 0)]
            for name, depth in (("a", NUM_LAYERS), ("b", 2), ("a", 1)):
                adapter = core.registry.select(name, depth).adapter
                assert adapter is not None
                slot = core.runner.slots.acquire(adapter.uid, adapter.content)  # type: ignore[arg-type]
                assert slot is not None
                core.runner.slots.release(adapter.uid)
                adapters.append((slot, depth))
            return graph_agreement(core.runner, adapters)

        yield compare


def test_recorded_steps_are_compared(recorded: Callable[[], Agreement]) -> None:
    found = recorded()
    assert found.is_passed
    assert found.num_compared == 4 * 4 * agreement._NUM_STEPS


def test_recorded_steps_with_the_wrong_adapter_differ(
    recorded: Callable[[], Agreement], monkeypatch: pytest.MonkeyPatch
) -> None:
    expand = TorchKernel.expand

    def with_the_first_slot(self: TorchKernel, output, low_rank, up, rows, *rest) -> None:
        expand(self, output, low_rank, up, Rows(rows.slots.clamp(max=0), rows.depths), *rest)

    monkeypatch.setattr(TorchKernel, "expand", with_the_first_slot)
    assert not recorded().is_passed


def test_targets_are_medians_over_the_rounds() -> None:
    report = GpuReport({}, limit=100.0)
    for ours, theirs in ((90, 100), (97, 100), (99, 100)):
        report.add(MIXED, ours)
        report.add(BASE, theirs)
    report.add(ONE, 85.0)
    values = [(target.value, target.verdict) for target in report.targets()]
    assert values == [(0.85, "met"), (0.97, "met"), (None, "not measured"), (None, "not measured")]
