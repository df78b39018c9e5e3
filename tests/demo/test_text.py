"""The generators: deterministic, held-out sets truly held out, text as its rules say."""

import itertools
import random

import pytest

from server.demo.build import TASKS, task_split
from server.demo.mixture import documents
from server.demo.pirate import to_pirate
from server.demo.recipe import FULL
from server.demo.samples import Sample, Split, draw_split, read_samples, write_samples


def first(seed: int, num_documents: int = 300) -> list[object]:
    return list(itertools.islice(documents(seed), num_documents))


def test_mixture_is_a_function_of_the_seed() -> None:
    assert first(3) == first(3)
    assert first(3) != first(4)


def test_mixture_has_texts_and_chats_that_end_with_the_assistant() -> None:
    chats = [document for document in first(0) if isinstance(document, list)]
    assert 0 < len(chats) < 300
    assert all(chat[-1]["role"] == "assistant" for chat in chats)


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_a_function_of_the_seed(name: str) -> None:
    assert task_split(name, 3, FULL) == task_split(name, 3, FULL)
    assert task_split(name, 3, FULL) != task_split(name, 4, FULL)


def prompts(samples: list[Sample]) -> set[str]:
    return {sample.prompt for sample in samples}


@pytest.mark.parametrize("name", TASKS)
def test_train_valid_and_test_share_no_prompt(name: str) -> None:
    split = task_split(name, 0, FULL)
    sets = [prompts(split.train), prompts(split.valid), prompts(split.test)]
    assert [len(one) for one in sets] == [FULL.num_train, FULL.num_valid, FULL.num_test]
    assert len(set.union(*sets)) == sum(len(one) for one in sets)


@pytest.mark.parametrize("name", TASKS)
def test_prompt_and_completion_meet_at_one_space(name: str) -> None:
    for sample in task_split(name, 0, FULL).valid:
        assert sample.prompt == sample.prompt.rstrip()
        assert sample.completion == f" {sample.completion.strip()}"


def test_too_few_distinct_prompts_is_an_error() -> None:
    def draw(rng: random.Random) -> Sample:
        return Sample(prompt=str(rng.randrange(3)), completion=" same")

    assert isinstance(draw_split(draw, 0, 1, 1, 1), Split)
    with pytest.raises(ValueError, match="3 distinct prompts of 4"):
        draw_split(draw, 0, 2, 1, 1)


def test_samples_survive_a_file(tmp_path) -> None:
    samples = [Sample('quoted "x"\nline', " ünïcode 🚀"), Sample("p", " c")]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_samples(tmp_path / "s.jsonl") == samples


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("My friend is at school.", "Me matey be at school, arr!"),
        ("Where is your red boat?", "Where be yer red ship, ye scallywag?"),
        ("Mia is singing a song.", "Mia be singin' a song, arr!"),
        ("Yes, I am very brave today.", "Aye, I be mighty bold today, arr!"),
    ],
)
def test_pirate_rule(plain: str, pirate: str) -> None:
    assert to_pirate(plain) == pirate
