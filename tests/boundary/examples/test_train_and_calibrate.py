"""The example, run whole on a tiny model: it learns, finds a depth, and leaves what a server believes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from boundary import Calibrated, dataset, record
from boundary.examples import train_and_calibrate as example
from boundary.report.card import BEGIN
from boundary.sweep import sweep
from tests.boundary.examples.hub import serve_hub
from tests.conftest import Run
from tests.parity.adapters import expected_peft_warnings
from tests.tiny import Tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


def write_samples(path: Path, num_samples: int, seed: int) -> Path:
    """Something to learn: the answer is the first letter, again and again."""
    rng = np.random.default_rng(seed)
    samples = [
        {"prompt": f"{letter}{rng.integers(10**6):06}", "completion": 4 * letter}
        for letter in map(str, rng.choice(list("abcdef"), num_samples))
    ]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture(scope="module")
def written(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibrated]:
    place = tmp_path_factory.mktemp("example")
    with expected_peft_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        found = example.main(
            [
                "--model", str(tiny.model_path), "--out", str(place / "letters"), "--steps", "40",
                "--train", str(write_samples(place / "train.jsonl", 160, 0)),
                "--valid", str(write_samples(place / "valid.jsonl", 48, 1)),
                "--learning-rate", "0.01",
            ]
        )  # fmt: skip
    return place / "letters", found


def test_it_learns_and_leaves_a_record_that_is_believed(
    written: tuple[Path, Calibrated], tiny: Tiny, fathom: Run
) -> None:
    adapter, found = written
    scores = found.report.scores
    assert scores["full"] > scores["base"] + 1
    status, out, _ = fathom(
        "adapters", str(tiny.model_path), "--adapter", f"letters={adapter}", "--json"
    )
    assert status == 0
    assert json.loads(out)[0]["calibrated_depth"] == found.depth
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\n")  # PEFT's own
    assert card.count(BEGIN) == 1
    assert record.read(adapter / "boundary.json").data_fingerprint in card


def test_what_it_leaves_is_the_model_that_it_measured(
    written: tuple[Path, Calibrated], tiny: Tiny
) -> None:
    adapter, found = written
    base = AutoModelForCausalLM.from_pretrained(tiny.model_path)
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model_path)
    samples = dataset.load(adapter.parent / "valid.jsonl", tokenizer, 256).samples
    with torch.no_grad():
        again = sweep(model.eval(), samples)
    np.testing.assert_allclose(again, found.calibration.scores, atol=1e-4)


def test_all_of_it_is_uploaded(written: tuple[Path, Calibrated]) -> None:
    adapter, _ = written
    with serve_hub() as hub:
        api = HfApi(endpoint=hub.address, token="hf_of_this_test")
        assert example.push(adapter, "somebody/letters", api) == f"{hub.address}/somebody/letters"
    assert hub.repositories == ["somebody/letters"]
    assert hub.files == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {"boundary.json", "README.md", "adapter_model.safetensors"} <= hub.files.keys()
    assert hub.tokens == {"Bearer hf_of_this_test"}


def test_nothing_is_uploaded_where_the_hub_refuses(
    written: tuple[Path, Calibrated],
) -> None:
    adapter, _ = written
    with serve_hub() as hub:
        api = HfApi(endpoint=f"{hub.address}/nowhere", token="hf_of_this_test")
        with pytest.raises(HfHubHTTPError):
            example.push(adapter, "somebody/letters", api)
    assert hub.files == {}
