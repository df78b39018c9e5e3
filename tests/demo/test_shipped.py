"""The shipped files: they load, each adapter is worth having, the README's figures are measured."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import server.demo
from boundary.depth import lora_depth
from server.demo import DATA, adapters, held_out_path, model_path, valid_path
from server.demo.build import TASKS, task_split
from server.demo.evaluate import as_markdown, completion_loss, read_scores
from server.demo.load import load_adapted
from server.demo.recipe import FULL
from server.demo.samples import read_samples

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FOLDER = Path(server.demo.__file__).parent


@pytest.mark.parametrize("name", TASKS)
def test_held_out_samples_are_those_of_the_seed(name: str) -> None:
    split = task_split(name, 0, FULL)
    assert read_samples(valid_path(name)) == split.valid
    assert read_samples(held_out_path(name)) == split.test


@pytest.mark.parametrize("name", TASKS)
def test_adapter_beats_the_base_on_held_out_samples(name: str) -> None:
    model, tokenizer = load_adapted(name, DATA)
    samples = read_samples(held_out_path(name))[:20]
    full = completion_loss(model, tokenizer, samples)
    with lora_depth(model, 0):
        assert full < completion_loss(model, tokenizer, samples) / 2


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The opposite of hot is", " cold."),
        ("The day after Monday is", " Tuesday."),
        ("A young cat is called", " a kitten."),
    ],
)
def test_base_knows_its_world(prompt: str, answer: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith(prompt + answer)


def test_readme_shows_the_measured_table() -> None:
    scores = read_scores(FOLDER / "depths.json")
    assert list(scores) == list(adapters())
    assert as_markdown(scores) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 12_000_000
