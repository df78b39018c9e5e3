"""A prompt and the completion it should get: the unit of fine-tuning, validation and test.

On disk a set of samples is JSON lines of `{"prompt": ..., "completion": ...}`, the format that
calibration reads.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One pair. A plain prompt ends without a space and its completion starts with one."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Split:
    """Three sets of which no two share a prompt."""

    train: list[Sample]
    valid: list[Sample]
    test: list[Sample]


def draw_split(
    draw: Callable[[random.Random], Sample],
    seed: int,
    num_train: int,
    num_valid: int,
    num_test: int,
) -> Split:
    """Draws distinct prompts until there are enough, then cuts them into three.

    Raises ValueError when `draw` cannot make that many distinct prompts.
    """
    rng = random.Random(seed)
    num_samples = num_train + num_valid + num_test
    samples: dict[str, Sample] = {}
    for _ in range(100 * num_samples):
        if len(samples) == num_samples:
            break
        sample = draw(rng)
        samples.setdefault(sample.prompt, sample)
    if len(samples) < num_samples:
        raise ValueError(f"only {len(samples)} distinct prompts of {num_samples} could be drawn")
    drawn = list(samples.values())
    return Split(
        train=drawn[:num_train],
        valid=drawn[num_train : num_train + num_valid],
        test=drawn[num_train + num_valid :],
    )


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes JSON lines, UTF-8, one sample a line."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_samples(path: Path) -> list[Sample]:
    """Reads what `write_samples` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Sample(**json.loads(line)) for line in lines]
