"""Public data sets as prompts and completions in three splits: `python -m server.bench.study.datasets`.

Reads the JSON lines that others publish, writes the JSON lines that training and calibration read.
What is asked in one split is asked in no other: E2E (restaurant descriptions, arXiv 1706.09254) is
dealt out by meaning representation, whatever the order of its attributes, and of each one validation
and test get one reference, so that samples are independent; GSM8K (word problems, arXiv 2110.14168)
keeps its own test set, and the questions of the other splits are not in it. Knows no tokenizer.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cyclopts

Name = Literal["e2e", "gsm8k"]

_CALCULATOR = re.compile(r"<<[^>]*>>")
"""GSM8K's notes to a calculator, which repeat the sum that they follow."""


class SourceError(ValueError):
    """A file that is not what was published, or too small for the splits asked for."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and its completion, which starts with the space between them."""

    prompt: str
    completion: str

    @property
    def num_chars(self) -> int:
        """Of both."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Samples in each split."""

    train: int
    valid: int
    test: int


Splits = Mapping[str, list[Pair]]
Fits = Callable[[Pair], bool]


def e2e_splits(source: Path, sizes: Sizes, seed: int, fits: Fits) -> Splits:
    """Meaning representations of `valid.jsonl` and `test.jsonl`, pooled and dealt out.

    Raises SourceError.
    """
    by_meaning: dict[tuple[str, ...], list[Pair]] = {}
    for where, record in _records(source / "valid.jsonl", source / "test.jsonl"):
        meaning, reference = _text(record, "mr", where), _text(record, "ref", where)
        pair = Pair(f"{meaning}\nDescription:", f" {reference}")
        references = by_meaning.setdefault(tuple(sorted(meaning.split(", "))), [])
        if fits(pair) and pair not in references:
            references.append(pair)
    rng = random.Random(f"{seed}/e2e")
    groups = [references for _, references in sorted(by_meaning.items()) if references]
    rng.shuffle(groups)
    num_held_out = sizes.valid + sizes.test
    held_out = [rng.choice(references) for references in groups[:num_held_out]]
    train = [pair for references in groups[num_held_out:] for pair in references]
    rng.shuffle(train)
    return _checked(
        {"train": train, "valid": held_out[: sizes.valid], "test": held_out[sizes.valid :]}, sizes
    )


def gsm8k_splits(source: Path, sizes: Sizes, seed: int, fits: Fits) -> Splits:
    """Train and validation from `train.jsonl`, test from `test.jsonl`. Raises SourceError."""
    rng = random.Random(f"{seed}/gsm8k")
    test = _questions(source / "test.jsonl")
    asked = _questions(source / "train.jsonl")
    rest = [pair for prompt, pair in asked.items() if prompt not in test and fits(pair)]
    held_out = [pair for pair in test.values() if fits(pair)]
    rng.shuffle(rest)
    rng.shuffle(held_out)
    return _checked(
        {"train": rest[sizes.valid :], "valid": rest[: sizes.valid], "test": held_out}, sizes
    )


_SPLITS: dict[Name, Callable[[Path, Sizes, int, Fits], Splits]] = {
    "e2e": e2e_splits,
    "gsm8k": gsm8k_splits,
}


def write_splits(splits: Splits, out: Path) -> None:
    """One `SPLIT.jsonl` each, UTF-8."""
    out.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        lines = (
            json.dumps({"prompt": pair.prompt, "completion": pair.completion}, ensure_ascii=False)
            for pair in pairs
        )
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _questions(path: Path) -> dict[str, Pair]:
    """By prompt; of a question that is asked twice, the first answer."""
    found: dict[str, Pair] = {}
    for where, record in _records(path):
        prompt = f"Question: {_text(record, 'question', where)}\nAnswer:"
        answer = _CALCULATOR.sub("", _text(record, "answer", where))
        found.setdefault(prompt, Pair(prompt, f" {answer}"))
    return found


def _records(*paths: Path) -> Iterator[tuple[str, object]]:
    """Each line's place and its content. Raises SourceError."""
    for path in paths:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{where}: {error}") from None


def _text(record: object, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"{where}: should have a text {field!r}")
    return " ".join(value.split()) if field != "answer" else value.strip()


def _checked(found: Splits, sizes: Sizes) -> Splits:
    wanted = {"train": sizes.train, "valid": sizes.valid, "test": sizes.test}
    for name, size in wanted.items():
        if len(found[name]) < size:
            raise SourceError(f"{len(found[name])} samples are left for {name}, not {size}")
    return {name: found[name][:size] for name, size in wanted.items()}


def main(
    name: Name,
    *,
    source: Path,
    out: Path,
    train: int = 1500,
    valid: int = 200,
    test: int = 300,
    max_chars: int | None = None,
    seed: int = 0,
) -> int:
    """Write train.jsonl, valid.jsonl and test.jsonl of a data set.

    Parameters
    ----------
    name
        Which data set the files in `source` are.
    source
        Directory of `valid.jsonl` and `test.jsonl` (e2e), or `train.jsonl` and `test.jsonl` (gsm8k).
    out
        Directory to write.
    train
        Samples to train with.
    valid
        Samples to calibrate with.
    test
        Samples that neither sees.
    max_chars
        Leave out samples that are longer, prompt and completion together.
    seed
        Of the order in which samples are dealt out.
    """
    left_out: set[Pair] = set()

    def fits(pair: Pair) -> bool:
        if max_chars is None or pair.num_chars <= max_chars:
            return True
        left_out.add(pair)
        return False

    try:
        splits = _SPLITS[name](source, Sizes(train, valid, test), seed, fits)
    except SourceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    write_splits(splits, out)
    sys.stdout.write(f"wrote {_counts(splits.items())} to {out}, {len(left_out)} were too long\n")
    return 0


def _counts(splits: Iterable[tuple[str, list[Pair]]]) -> str:
    return ", ".join(f"{name} {len(pairs)}" for name, pairs in splits)


if __name__ == "__main__":
    cyclopts.run(main)
