"""The commands from their flags to a table, a file, a drawing and a status."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.bench.load import LoadResult
from server.bench.scaling import curve
from server.bench.scaling.step import ProductRecorder
from server.model.native.step import NativeStep
from server.model.replay.step_replay import StepReplay
from server.model.sdpa import AttentionStep
from tests.bench.scaling.conftest import TINY, Run


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert list(found) == [
        "schema", "date", "command", "machine", "versions", "facts", "findings",
    ]  # fmt: skip
    assert not Path(
        found["command"][0]
    ).is_absolute()  # where the program lies is nobody's business
    return found


@pytest.mark.parametrize(
    ("command", "values", "quantity"),
    [
        ("concurrency", [1, 3], "requests in flight"),
        ("adapters", [1, 3], "distinct adapters in the batch"),
        ("rank", [2, 4], "rank"),
        ("context", [5, 20], "prompt tokens"),
    ],
)
def test_a_curve_is_a_table_a_file_and_a_drawing(
    run: Run, tmp_path: Path, command: str, values: list[int], quantity: str
) -> None:
    files = ["--json", str(tmp_path / "curve.json"), "--svg", str(tmp_path / "curve.svg")]
    status, out, err = run(command, "--values", *map(str, values), *TINY, *files)
    assert status == 0, err
    assert quantity in out
    report = read(tmp_path / "curve.json")
    assert report["facts"]["seed"] == 0
    found = report["findings"]["curve"]
    assert (found["quantity"], found["errors"]) == (quantity, [])
    assert [point["x"] for point in found["points"]] == values
    for point in found["points"]:
        assert len(point["runs"]) == 2
        for measured in point["runs"]:
            assert measured["num_failed"] == measured["num_cached_tokens"] == 0
            assert measured["num_preemptions"] == 0
            assert measured["num_output_tokens"] == 4 * measured["num_requests"]
    drawing = ElementTree.parse(tmp_path / "curve.svg").getroot()
    assert quantity in "".join(drawing.itertext())


def test_curves_stand_beside_each_other(run: Run, tmp_path: Path) -> None:
    reports = [str(tmp_path / f"{name}.json") for name in ("rank", "context")]
    for report in reports:
        command = Path(report).stem
        status, _, err = run(command, "--values", "2", "4", "8", *TINY, "--json", report)
        assert status == 0, err
    drawing = tmp_path / "scaling.svg"
    status, _, err = run("picture", *reports, "--svg", str(drawing), "--title", "Both")
    assert status == 0, err
    text = "".join(ElementTree.parse(drawing).getroot().itertext())
    for word in ("Both", "rank", "prompt tokens", "output tokens/s"):
        assert word in text


def test_what_is_no_curves_report_is_refused(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"findings": []}', encoding="utf-8")
    for reports, reason in (([str(other)], "not a curve"), ([], "no report"), (["none"], "none")):
        status, _, err = run("picture", *reports, "--svg", str(tmp_path / "none.svg"))
        assert status != 0
        assert reason in err


def test_depth_explains_itself(run: Run, tmp_path: Path) -> None:
    status, out, err = run("depth", *TINY, "--json", str(tmp_path / "depth.json"))
    assert status == 0, err
    assert "a layer's LoRA" in out
    findings = read(tmp_path / "depth.json")["findings"]
    assert [point["x"] for point in findings["curve"]["points"]] == [0, 1, 2]
    base, one, two = findings["explanation"]["steps"]
    # Two adapters of rank 2 on seven modules of 32 x 32, 32 x 96 and 96 x 32, in float32.
    layer_bytes = 2 * 4 * 2 * (4 * (32 + 32) + 3 * (32 + 96))
    assert [step["lora_bytes"] for step in (base, one, two)] == [0, layer_bytes, 2 * layer_bytes]
    assert base["num_launches"] < one["num_launches"] < two["num_launches"]
    assert two["num_launches"] - one["num_launches"] == one["num_launches"] - base["num_launches"]


def test_a_step_is_set_beside_its_products(run: Run, tmp_path: Path) -> None:
    options = ["--values", "1", "3", "--json", str(tmp_path / "step.json")]
    status, out, err = run("step", *TINY, *options)
    assert status == 0, err
    assert "step / products" in out
    found = read(tmp_path / "step.json")["findings"]
    assert [one["num_rows"] for one in found] == [1, 3]
    for one in found:
        assert list(one["at_depth"]) == ["0", "1", "2"]
        # Whatever the machine does meanwhile, a whole step of a tiny model is mostly not products.
        assert 0 < one["linears"]["min"] < one["base"]["max"]


def test_int8_is_set_beside_none(run: Run, tmp_path: Path) -> None:
    options = ["--values", "1", "3", "--prefill-len", "20", "--json", str(tmp_path / "int8.json")]
    status, out, err = run("quantized", *TINY, *options)
    assert status == 0, err
    assert "times as fast" in out
    found = read(tmp_path / "int8.json")["findings"]
    kinds = ["1 rows, base", "1 rows, adapters", "3 rows, base", "3 rows, adapters"]
    assert [one["what"] for one in found["times"]] == [*kinds, "prefill of 20"]
    # Two layers of 4 (32 x 32) and 3 (32 x 96), of four bytes or of one and a scale an output.
    weights, outputs = 2 * (4 * 32 * 32 + 3 * 32 * 96), 2 * (4 * 32 + 2 * 96 + 32)
    saved = found["base_bytes"]["none"] - found["base_bytes"]["int8"]
    assert saved == 3 * weights - 4 * outputs


def test_all_products_of_a_step_are_recorded() -> None:
    weight = torch.ones(4, 4)
    with ProductRecorder() as recorder, torch.inference_mode():
        functional.linear(torch.ones(1, 4), weight).relu() @ weight
    assert len(recorder.calls) == 2


def test_a_failed_request_is_told_and_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    true = curve.drive

    async def drive(*arguments: Any) -> LoadResult:
        result = await true(*arguments)
        result.timings[0].error = "it broke"
        return result

    monkeypatch.setattr(curve, "drive", drive)
    status, _, err = run("rank", "--values", "2", *TINY)
    assert status == 1
    assert "error: it broke" in err


def test_resident(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "resident.json"
    model = ["--random-model", "4x32:vocab=100:positions=64", "--rank", "2", "--repeat", "1"]
    status, out, err = run("resident", *model, "--budget-slots", "3", "--json", str(path))
    assert status == 0, err
    assert "slots a GiB" in out
    found = read(path)["findings"]
    assert [one["depth"] for one in found] == [1, 2, 3, 4]
    layer_bytes = found[0]["slot_bytes"]
    assert layer_bytes == 4 * 2 * (4 * (32 + 32) + 3 * (32 + 96))
    assert [one["slot_bytes"] for one in found] == [layer_bytes * depth for depth in range(1, 5)]
    assert [one["num_fit"] for one in found] == [12, 6, 4, 3]


def test_registered(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "registered.json"
    model = ["--random-model", "2x32:vocab=100:positions=64", "--rank", "2"]
    status, out, err = run(
        "registered", *model, "--values", "20", "--repeat", "1", "--json", str(path)
    )
    assert status == 0, err
    assert "start, s" in out
    found = read(path)["findings"]
    assert [(one["way"], one["num_adapters"]) for one in found] == [("root", 20), ("named", 20)]
    assert [one["runs"][0]["num_files"] for one in found] == [0, 2 * 20 + 4]


PREFIX = ["prefix", *TINY, "--system-len", "20", "--num-requests", "3"]


def test_prefix(run: Run, tmp_path: Path) -> None:
    """A block holds 16 of the 20 tokens that a choice's requests share, and 6 are their own."""
    path = tmp_path / "prefix.json"
    status, out, err = run(*PREFIX, "--json", str(path))
    assert status == 0, err
    assert "hit rate" in out
    found = {one["choice"]: one for one in read(path)["findings"]}
    assert list(found) == ["a0@0", "a0@1", "a0@2", "a1@0", "a1@1", "a1@2"]
    for choice, one in found.items():
        assert one["hit_rate"]["each"] == [16 / 26] * 2
        # Depth 0 is the base model under any adapter's name.
        assert one["cold_hits"] == ([16] * 2 if choice == "a1@0" else [0] * 2)
        assert len(one["runs"]["with"]) == len(one["runs"]["without"]) == 2
        assert {run["num_cached_tokens"] for run in one["runs"]["without"]} == {0}


def test_blocks_that_another_adapter_computed_would_be_seen(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.core.root_key", lambda *_: b"the same for all")
    status, _, err = run(*PREFIX)
    assert status == 1
    assert "a1@2: unexpected hits" in err


def test_preemption(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "preemption.json"
    load = ["--concurrency", "8", "--rounds", "2", "--prompt-len", "12", "--output-len", "24"]
    model = [*TINY[:6], "--repeat", "1"]
    values = ["--values", "100", "50"]
    status, _, err = run("preemption", *model, *load, *values, "--json", str(path))
    assert status == 0, err
    whole, half = read(path)["findings"]
    assert (whole["num_blocks"], half["num_blocks"]) == (8 * 3, 4 * 3)
    assert whole["runs"][0]["num_preemptions"] == whole["runs"][0]["num_recomputed_tokens"] == 0
    assert half["runs"][0]["num_preemptions"] > 0
    assert half["runs"][0]["num_recomputed_tokens"] > 0
    assert half["runs"][0]["num_failed"] == 0


def test_a_broken_bound_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.scaling.preemption.MAX_RECOMPUTED", 0)
    status, _, err = run("preemption", "--values", "100", *TINY)
    assert status == 1
    assert "100 %: over the bound" in err


LONG = [
    "long-context", "--random-model", "2x64:heads=4:kv_heads=2:vocab=100:positions=4096",
    "--rank", "2", "--values", "512", "1024", "2048",
]  # fmt: skip


@pytest.mark.parametrize("chunk", ["128", "4000"])
def test_memory_of_a_long_prompt_grows_like_the_prompt(run: Run, chunk: str) -> None:
    """Also as one chunk: no kernel makes scores of all pairs."""
    status, out, err = run(*LONG, "--max-num-batched-tokens", chunk)
    assert status == 0, err
    assert "a token" in out


def test_scores_of_all_pairs_would_be_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ value

    monkeypatch.setattr("server.model.selftest.check", lambda *_: 0.0)
    monkeypatch.setattr("server.model.sdpa.scaled_dot_product_attention", scores)
    monkeypatch.setattr(NativeStep, "attend", AttentionStep.attend)
    monkeypatch.setattr(StepReplay, "run", lambda *_: None)  # whose kernels attend by themselves
    status, _, err = run(*LONG, "--max-num-batched-tokens", "4000")
    assert status == 1, err
    assert "grows faster than the prompt" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["depth", "--values", "3", *TINY], "a depth is at most 2"),
        (["context", "--values", "61", *TINY], "at most 64 tokens together"),
        (["rank", "--random-model", "big"], "--random-model: should be"),
        (["rank", "--repeat", "0"], "repeat"),
        (["concurrency", *TINY[:2], "--prompt-len", "100"], "are over the model's 64"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: list[str], match: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert match in err + out
