"""Training writes an adapter that learned its completions, twice the same, and refuses by line."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from boundary.dataset import Sample
from server.bench.study.finetune import IGNORED, Recipe, collate, main
from tests.parity.adapters import expected_peft_warnings
from tests.parity.zoo import BY_NAME, EOS, save_model

RECIPE = Recipe(rank=4, alpha=8, epochs=3, lr=1e-2, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BY_NAME["llama"], tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    records = [{"prompt": f"{n}:", "completion": " abab"} for n in range(16)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def loss(base: Path, adapter: Path | None, text: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        with expected_peft_warnings():
            model = PeftModel.from_pretrained(model, str(adapter))
    token_ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        found: float = model(input_ids=token_ids, labels=token_ids).loss.item()
    return found


def test_an_adapter_learns_what_it_was_shown(base: Path, data: Path, tmp_path: Path) -> None:
    assert main(str(base), data=data, out=tmp_path / "adapter", recipe=RECIPE) == 0
    shown, not_shown = "7: abab", "7: baba"
    adapter = tmp_path / "adapter"
    assert loss(base, adapter, shown) < 0.8 * loss(base, None, shown)
    assert loss(base, adapter, shown) < loss(base, adapter, not_shown)
    facts = json.loads((adapter / "training.json").read_text())
    assert facts["recipe"] == {
        "rank": 4, "alpha": 8, "epochs": 3, "lr": 1e-2, "batch_size": 4, "seed": 0,
    }  # fmt: skip
    assert facts["num_samples"] == 16
    assert len(facts["loss_by_epoch"]) == 3
    assert facts["loss_by_epoch"][-1] < facts["loss_by_epoch"][0]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == sorted(BY_NAME["llama"].targets)


def test_a_seed_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    files = ("adapter_model.safetensors", "adapter_config.json", "training.json")

    def content(name: str, seed: int) -> list[bytes]:
        recipe = Recipe(rank=2, epochs=1, seed=seed)
        out = tmp_path / name
        assert main(str(base), data=data, out=out, max_samples=5, recipe=recipe) == 0
        return [(out / file).read_bytes() for file in files]

    first = content("first", 1)
    assert content("again", 1) == first
    assert content("other", 2)[0] != first[0]


def test_the_loss_counts_the_completion_and_its_end_alone() -> None:
    samples = [Sample((1, 2, 3), (4,), ""), Sample((5,), (6, 7), "")]
    batch = collate(samples, EOS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, EOS], [5, 6, 7, EOS, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, no, 4, EOS], [no, 6, 7, EOS, no]]
    assert collate(samples, None)["labels"].tolist() == [[no, no, no, 4], [no, 6, 7, no]]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"prompt": "a"}\n', "no completions"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: 'completion'"),
        ("", "no samples"),
    ],
)
def test_bad_data_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, match: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert main(str(base), data=path, out=tmp_path / "adapter") == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_is_not_there_is_said(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(str(tmp_path / "none"), data=data, out=tmp_path / "adapter") == 1
    assert "none" in capsys.readouterr().err
