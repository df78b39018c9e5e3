"""`fathom calibrate`: from files to a depth, a record, a table and a report; what is refused, and how."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from boundary import dataset, record
from boundary.depth import lora_depth
from boundary.sweep import reference, sweep
from server.calibrate import parse_files
from server.config import ConfigError
from tests.conftest import Run
from tests.parity.adapters import expected_peft_warnings
from tests.parity.zoo import NUM_LAYERS
from tests.tiny import Tiny

NUM_SAMPLES = 40
PLANTED = 2
WORDS = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his"]


@dataclass(frozen=True, slots=True)
class Case:
    """A base model, an adapter whose upper layers are noise, and samples."""

    model: Path
    adapter: Path
    data: Path
    test: Path


def write_samples(path: Path, num_samples: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        json.dumps(
            {
                "prompt": " ".join(rng.choice(WORDS, 5)),
                "completion": " " + " ".join(rng.choice(WORDS, 3)),
            }
        )
        for _ in range(num_samples)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def with_noise_above(source: Path, target: Path, layer: int) -> Path:
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name and int(name.split(".layers.")[1].split(".")[0]) >= layer:
            tensors[name] = tensors[name] * 8
    save_file(tensors, file)
    return target


def plain_peft(case: Case) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(case.model)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(base, case.adapter).eval()


def plant(case: Case, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of many samples keep those that the planted depth likes better than full does."""
    write_samples(case.data, 8 * NUM_SAMPLES, 5)
    samples = dataset.load(case.data, tokenizer, 256).samples
    masks = [tuple(layer < depth for layer in range(NUM_LAYERS)) for depth in (PLANTED, NUM_LAYERS)]
    planted, full = sweep(model, samples, masks=masks).T
    lines = case.data.read_text().splitlines()
    kept = sorted(np.argsort(full - planted)[:NUM_SAMPLES])
    case.data.write_text("".join(lines[index] + "\n" for index in kept))


@pytest.fixture
def case(tiny: Tiny, tmp_path: Path) -> Case:
    return Case(
        tiny.model_path,
        with_noise_above(tiny.adapter("a"), tmp_path / "noisy", PLANTED),
        write_samples(tmp_path / "data.jsonl", NUM_SAMPLES, 0),
        write_samples(tmp_path / "test.jsonl", 10, 1),
    )


def test_noise_in_the_upper_layers_is_found_written_and_served(
    case: Case, fathom: Run, tmp_path: Path
) -> None:
    model, tokenizer = plain_peft(case), AutoTokenizer.from_pretrained(case.model)
    plant(case, model, tokenizer)
    status, out, err = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data),
        "--test", str(case.test), "--write", "--report", str(tmp_path / "report"), "--json",
    )  # fmt: skip
    assert status == 0, err
    (found,) = json.loads(out)
    assert found["selection"]["verdict"] == "improves"
    depth = found["selection"]["depth"]
    assert depth < NUM_LAYERS

    # The curve is that of one PEFT forward pass a depth.
    samples = dataset.load(case.data, tokenizer, 256).samples
    curve = [point["score"] for point in found["selection"]["curve"]]
    np.testing.assert_allclose(curve, reference(model, samples).mean(axis=0), atol=1e-4)
    held_out = reference(model, dataset.load(case.test, tokenizer, 256).samples).mean(axis=0)
    for name, at in (("base", 0), ("chosen", depth), ("full", NUM_LAYERS)):
        assert found["held_out"][name] == pytest.approx(held_out[at], abs=1e-4)

    # The record is beside the weights, and what `auto` means from now on.
    assert record.read(case.adapter / record.FILE_NAME).depth == depth
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "curve.svg", "report.json", "report.md",
    }  # fmt: skip
    status, out, _ = fathom(
        "generate", str(case.model), "--adapter", f"x={case.adapter}", "--prompt", "the of",
        "--depth", "auto", "--json", "--max-tokens", "4",
    )  # fmt: skip
    assert status == 0
    assert [found["depth"] for found in json.loads(out)] == [depth]
    with lora_depth(model, depth):
        ids = tokenizer("the of", return_tensors="pt")
        tokens = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert json.loads(out)[0]["token_ids"] == tokens[0, ids["input_ids"].shape[1] :].tolist()


def test_many_adapters_give_one_table(case: Case, tiny: Tiny, fathom: Run) -> None:
    write_samples(case.adapter / "valid.jsonl", NUM_SAMPLES, 2)
    status, out, err = fathom(
        "calibrate", str(case.model), str(case.adapter), str(tiny.adapter("shallow")),
        "--adapter", f"third={tiny.adapter('c')}", "--data", f"shallow={case.data}",
        "--data", f"third={case.data}", "--max-samples", "33", "--test", f"third={case.test}",
    )  # fmt: skip
    assert status == 0, err
    rows = [line.split() for line in out.splitlines() if "log_likelihood" in line]
    assert [(row[0], row[2]) for row in rows] == [
        ("third", "33"),
        ("noisy", "33"),
        ("shallow", "33"),
    ]
    assert "held out" in out


def test_texts_can_be_judged(case: Case, fathom: Run) -> None:
    status, out, err = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data),
        "--test", str(case.test), "--metric", "chrf", "--max-tokens", "4", "--json",
    )  # fmt: skip
    assert status == 0, err
    (found,) = json.loads(out)
    assert found["metric"] == "chrf"
    assert all(0 <= point["score"] <= 1 for point in found["selection"]["curve"])
    assert set(found["held_out"]) == {"base", "chosen", "full"}


def test_too_few_samples_conclude_nothing(case: Case, fathom: Run) -> None:
    status, out, _ = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data), "--write",
        "--max-samples", "8",
    )  # fmt: skip
    assert status == 1
    assert "too few" in out
    assert not (case.adapter / record.FILE_NAME).exists()


def test_keep_full_takes_no_confirmed_depth_back(tiny: Tiny, fathom: Run, tmp_path: Path) -> None:
    """Layers that matter alike: the same adapter at every depth is none, so nothing is shown."""
    adapter = tmp_path / "still"
    shutil.copytree(tiny.adapter("a"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeroed = {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zeroed, adapter / "adapter_model.safetensors")
    data = write_samples(tmp_path / "data.jsonl", NUM_SAMPLES, 0)
    arguments = ("calibrate", str(tiny.model_path), str(adapter), "--data", str(data), "--write")
    assert fathom(*arguments)[0] == 0
    first = (adapter / record.FILE_NAME).read_bytes()
    assert record.read(adapter / record.FILE_NAME).verdict == "keep_full"
    _, _, err = fathom(*arguments)
    assert "stays as it is" in err
    assert (adapter / record.FILE_NAME).read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no samples"),
        ('{"prompt": "the", "completion": "of"}\n{"prompt": "the"}\n', "line 2"),
        ('{"prompt": "the", "completion": ""}\n', "line 1: 'completion'"),
        ('{"prompt": "the", "completion": "' + "of " * 900 + '"}\n', "line 1: 'completion'"),
        ('{"prompt": "the"}\n', "needs completions"),
        ("not json\n", "line 1"),
    ],
)
def test_bad_data_is_one_line_that_names_file_line_and_field(
    case: Case, fathom: Run, content: str, message: str
) -> None:
    case.data.write_text(content)
    status, out, err = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data), "--write"
    )
    last = err.splitlines()[-1]
    assert (status, out) == (1, "")
    assert last.startswith("fathom: ")
    assert message in last
    assert not (case.adapter / record.FILE_NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--metric", "wit"], 1, "unknown metric 'wit'"),
        (["--metric", "kl_to_full"], 2, "kl_to_full needs a tolerance"),
        (["--metric", "regex_answer", "--pattern", "(a"], 1, "pattern"),
        (["--tolerance", "-1"], 2, "--tolerance"),
        (["--data", "other=x.jsonl"], 2, "no adapter 'other'"),
        (["--name", "other"], 2, "no adapter is named 'other'"),
        (["--max-samples", "0"], 2, "--max-samples"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    case: Case, fathom: Run, arguments: list[str], status: int, message: str
) -> None:
    found = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data), *arguments
    )
    assert found[0] == status
    assert message in found[2].splitlines()[-1]


def test_an_adapter_of_another_base_is_refused(case: Case, fathom: Run, tmp_path: Path) -> None:
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    (case.adapter / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["c_attn"]})
    )
    status, _, err = fathom(
        "calibrate", str(case.model), str(case.adapter), "--data", str(case.data)
    )
    assert status == 1
    assert "noisy" in err.splitlines()[-1]


def test_files_for_all_and_for_one() -> None:
    files = parse_files("--data", ["all.jsonl", "sql=sql.jsonl"])
    assert (files.of("sql"), files.of("other")) == (Path("sql.jsonl"), Path("all.jsonl"))
    for given in (["a", "b"], ["x=a", "x=b"]):
        with pytest.raises(ConfigError, match="--data"):
            parse_files("--data", given)
