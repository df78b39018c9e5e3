"""Public data sets as splits: disjoint by what is asked, the same for a seed, bad files by line."""

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pytest

from server.bench.study.datasets import (
    Pair,
    Sizes,
    SourceError,
    e2e_splits,
    gsm8k_splits,
    main,
)

SIZES = Sizes(train=12, valid=5, test=6)


def write(path: Path, records: list[Mapping[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def everything(_: Pair) -> bool:
    return True


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    """24 meaning representations with three references each, and one that repeats in another order."""
    folder = tmp_path / "e2e"
    folder.mkdir()
    for name, numbers in {"valid": range(12), "test": range(8, 24)}.items():
        records = []
        for number in numbers:
            attributes = [f"name[Inn {number}]", "food[Thai]", "area[city centre]"]
            for version in range(3):
                mr = ", ".join(attributes if name == "valid" else attributes[::-1])
                records.append({"mr": mr, "ref": f"Inn {number} is Thai, {version}."})
        write(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """The first question of the test set is in the training set too."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for name, numbers in {"train": range(30), "test": [0, *range(30, 40)]}.items():
        records = [
            {
                "question": f"What is {number}  and 1?",
                "answer": f"It is {number}+1=<<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1}",
            }
            for number in numbers
        ]
        write(folder / f"{name}.jsonl", records)
    return folder


def meaning(pair: Pair) -> frozenset[str]:
    return frozenset(pair.prompt.removesuffix("\nDescription:").split(", "))


def test_no_meaning_is_in_two_splits(e2e: Path) -> None:
    splits = e2e_splits(e2e, SIZES, 0, everything)
    assert {name: len(pairs) for name, pairs in splits.items()} == {
        "train": 12, "valid": 5, "test": 6,
    }  # fmt: skip
    meanings = {name: [meaning(pair) for pair in pairs] for name, pairs in splits.items()}
    for one, other in combinations(meanings.values(), 2):
        assert not set(one) & set(other)
    assert len(set(meanings["valid"])) == 5
    assert len(set(meanings["test"])) == 6
    assert len(set(meanings["train"])) < 12  # training may see a meaning in several words


def test_pairs_read_as_one_text(e2e: Path, gsm8k: Path) -> None:
    (pair, *_) = e2e_splits(e2e, Sizes(1, 1, 1), 0, everything)["valid"]
    assert pair.prompt.endswith("]\nDescription:")
    assert pair.completion.startswith(" Inn ")
    (pair, *_) = gsm8k_splits(gsm8k, Sizes(1, 1, 1), 0, everything)["valid"]
    number = int(pair.prompt.removeprefix("Question: What is ").split()[0])
    assert pair == Pair(
        f"Question: What is {number} and 1?\nAnswer:",
        f" It is {number}+1={number + 1}.\n#### {number + 1}",
    )


def test_a_question_of_the_test_set_is_not_trained_on(gsm8k: Path) -> None:
    splits = gsm8k_splits(gsm8k, Sizes(20, 9, 11), 0, everything)
    prompts = {name: {pair.prompt for pair in pairs} for name, pairs in splits.items()}
    repeated = "Question: What is 0 and 1?\nAnswer:"
    assert repeated in prompts["test"]
    for one, other in combinations(prompts.values(), 2):
        assert not one & other
    with pytest.raises(SourceError, match="20 samples are left for train, not 21"):
        gsm8k_splits(gsm8k, Sizes(21, 9, 11), 0, everything)


@pytest.mark.parametrize("splits_of", [e2e_splits, gsm8k_splits])
def test_a_seed_gives_the_same_splits_and_another_seed_others(
    splits_of: object, request: pytest.FixtureRequest
) -> None:
    assert callable(splits_of)
    source = request.getfixturevalue("e2e" if splits_of is e2e_splits else "gsm8k")
    first, again, other = (splits_of(source, SIZES, seed, everything) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_long_samples_are_left_out_and_counted(
    gsm8k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    longest = len("Question: What is 9 and 1?\nAnswer: It is 9+1=9.\n#### 9")
    sizes = {"train": 4, "valid": 4, "test": 1}
    assert main("gsm8k", source=gsm8k, out=out, max_chars=longest, **sizes) == 0
    assert "wrote train 4, valid 4, test 1" in capsys.readouterr().out
    for name, size in sizes.items():
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == size
        for line in lines:
            record = json.loads(line)
            assert list(record) == ["prompt", "completion"]
            assert len(record["prompt"] + record["completion"]) <= longest
    assert main("gsm8k", source=gsm8k, out=out, max_chars=longest, train=30) == 1
    assert "are left for train, not 30" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "valid.jsonl:2"),
        ('{"mr": "name[A]"}', "valid.jsonl:2: should have a text 'ref'"),
        ('{"mr": " ", "ref": "A."}', "valid.jsonl:2: should have a text 'mr'"),
        ("[]", "valid.jsonl:2: should have a text 'mr'"),
    ],
)
def test_bad_lines_are_named(e2e: Path, line: str, match: str) -> None:
    path = e2e / "valid.jsonl"
    path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n")
    with pytest.raises(SourceError, match=match):
        e2e_splits(e2e, SIZES, 0, everything)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"test\.jsonl cannot be read"):
        gsm8k_splits(tmp_path, SIZES, 0, everything)
