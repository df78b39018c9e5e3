"""Scores of given logits against torch's own losses."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from boundary.sample import completion_positions, every_position, token_ids
from boundary.score import KLToFull, LogLikelihood

NUM_MASKS, NUM_POSITIONS, VOCAB_SIZE = 3, 5, 11
NEXT = torch.tensor([3, 0, 10, 7, 7])


@dataclass(frozen=True)
class Sample:
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_MASKS, NUM_POSITIONS, VOCAB_SIZE, generator=generator) * 4


def test_log_likelihood_is_the_negative_loss(logits: torch.Tensor) -> None:
    values = LogLikelihood().values(logits, NEXT, logits[0])
    for row, of_mask in zip(values, logits, strict=True):
        loss = functional.cross_entropy(of_mask, NEXT, reduction="none")
        torch.testing.assert_close(row, -loss)


def test_kl_is_torchs(logits: torch.Tensor) -> None:
    full = logits[1]
    values = KLToFull().values(logits, NEXT, full)
    for row, of_mask in zip(values, logits, strict=True):
        expected = functional.kl_div(
            of_mask.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
        )
        torch.testing.assert_close(row, expected.sum(-1))
    assert (values[1] == 0).all()
    assert values[[0, 2]].min() > 0


def test_kl_is_from_full_and_not_to_it(logits: torch.Tensor) -> None:
    there = KLToFull().values(logits[:1], NEXT, logits[1])
    back = KLToFull().values(logits[1:2], NEXT, logits[0])
    assert (there - back).abs().max() > 1e-2


def test_low_precision_logits_are_scored_in_float32(logits: torch.Tensor) -> None:
    rounded = logits.bfloat16()
    for score in (LogLikelihood(), KLToFull()):
        values = score.values(rounded, NEXT, rounded[0])
        assert values.dtype == torch.float32
        expected = score.values(rounded.float(), NEXT, rounded[0].float())
        torch.testing.assert_close(values, expected)


def test_positions() -> None:
    sample = Sample((4, 5, 6), (7, 8))
    assert token_ids(sample) == [4, 5, 6, 7, 8]
    assert list(completion_positions(sample)) == [2, 3]
    assert list(every_position(sample)) == [0, 1, 2, 3, 4]
    assert LogLikelihood().positions(sample) == completion_positions(sample)
    assert KLToFull().positions(sample) == every_position(sample)
    assert KLToFull(completion_positions).positions(sample) == completion_positions(sample)
    assert not completion_positions(Sample((4, 5), ()))
