"""How close a generated text is to its reference: one number in [0, 1], higher is better.

`TEXT_METRICS` names the metrics, `text_score` makes one of them. Each looks at one sample alone, as
selection needs it. Knows no model and no data set; called by calibration with whole texts.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import regex

from boundary.answer import Extract, PatternAnswer, canonical_answer, last_number
from boundary.strict_json import shown

# Scripts that put no space between words: each character counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"(?=\p{{L}})[{_UNSPACED}]\p{{M}}*|(?:(?!(?=\p{{L}})[{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"
)
_ASCII_SYMBOL_OR_PUNCTUATION = regex.compile(r"[!-/:-@\[-`{-~]|\p{P}")

Prepared = TypeVar("Prepared")


class TextScore(Protocol):
    """One metric, ready to score.

    signature: how it is computed, to be cited with its numbers.
    """

    signature: str

    def __call__(self, prediction: str, reference: str) -> float:
        """The score in [0, 1]. Raises ValueError as `check` does, without the sample's number."""

    def check(self, references: Iterable[str]) -> None:
        """Raise ValueError for the first reference in which there is nothing to compare with.

        It names the sample, counted from 0. Worth asking before anything is generated.
        """


@dataclass(frozen=True, slots=True)
class TextMetric:
    """An entry of the registry.

    make: the metric with a pattern, or with None; raises ValueError for a pattern that is no good.
    """

    description: str
    make: Callable[[str | None], TextScore]
    takes_pattern: bool = False


def text_score(name: str, *, pattern: str | None = None) -> TextScore:
    """The metric of this name.

    pattern: a regular expression with one group, for `regex_answer` alone; see `answer`.

    Raises ValueError for an unknown name, a pattern that is not usable, or one too many.
    """
    metric = TEXT_METRICS.get(name)
    if metric is None:
        raise ValueError(f"unknown metric {shown(name)}; known are {', '.join(TEXT_METRICS)}")
    if pattern is not None and not metric.takes_pattern:
        raise ValueError(f"metric {name!r} takes no pattern")
    return metric.make(pattern)


def normalized(text: str, *, folded: bool = False) -> str:
    """NFKC, stripped, each run of white space one space.

    folded: also without case and without punctuation and ASCII symbols, as SQuAD's evaluation does;
        unlike SQuAD's, articles stay and other scripts' punctuation goes. It makes "-5" equal "5".
    """
    text = unicodedata.normalize("NFKC", text)
    if folded:
        text = _ASCII_SYMBOL_OR_PUNCTUATION.sub("", text.casefold())
        text = unicodedata.normalize("NFKC", text)  # what was parted may now combine
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """What ROUGE-L counts: runs of letters, marks and digits, in lower case after NFKC.

    Of ASCII text the same as `rouge_score`'s default tokenizer. That one splits at every other
    letter ("café" is "caf") and sees no other script at all; here every script counts, and one
    without spaces between words counts character by character.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def common_subsequence_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): a row of the usual
    table is one integer whose zero bits are the places where the length grows.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(one) - row.bit_count()


class _Score(Generic[Prepared]):
    """A metric in two steps: what a reference comes to, and a prediction beside it.

    prepare: raises ValueError if the reference has nothing in it to compare with.
    """

    def __init__(
        self,
        signature: str,
        prepare: Callable[[str], Prepared],
        compare: Callable[[str, Prepared], float],
    ) -> None:
        self.signature = signature
        self._prepare = prepare
        self._compare = compare

    def __call__(self, prediction: str, reference: str) -> float:
        return self._compare(prediction, self._prepare(reference))

    def check(self, references: Iterable[str]) -> None:
        for index, reference in enumerate(references):
            try:
                self._prepare(reference)
            except ValueError as error:
                raise ValueError(f"sample {index}: {error}") from None


def _exact_match(*, folded: bool) -> TextScore:
    def prepare(reference: str) -> str:
        return _filled(normalized(reference, folded=folded), "text", reference)

    def compare(prediction: str, reference: str) -> float:
        return float(normalized(prediction, folded=folded) == reference)

    how = "nfkc+casefold+no_punctuation" if folded else "nfkc"
    return _Score(f"exact_match|{how}+white_space", prepare, compare)


def _regex_answer(pattern: str | None) -> TextScore:
    extract: Extract = last_number if pattern is None else PatternAnswer(pattern)

    def prepare(reference: str) -> object:
        return canonical_answer(_filled(extract(reference), "answer", reference))

    def compare(prediction: str, answer: object) -> float:
        found = extract(prediction)
        return float(found is not None and canonical_answer(found) == answer)

    which = "last_number" if pattern is None else f"last match of {pattern}"
    return _Score(f"regex_answer|{which}", prepare, compare)


def _rouge_l() -> TextScore:
    def prepare(reference: str) -> list[str]:
        return _filled(words(reference), "word", reference)

    def compare(prediction: str, reference: list[str]) -> float:
        predicted = words(prediction)
        common = common_subsequence_length(predicted, reference)
        return 2 * common / (len(predicted) + len(reference))

    return _Score("rouge_l|f1|nfkc+lower|unicode_words", prepare, compare)


def _bleu() -> TextScore:
    from sacrebleu.metrics.bleu import BLEU

    return _sacrebleu("bleu", BLEU(effective_order=True))


def _chrf() -> TextScore:
    from sacrebleu.metrics.chrf import CHRF

    return _sacrebleu("chrf", CHRF())


class _Scored(Protocol):
    score: float


class _SentenceMetric(Protocol):
    def sentence_score(self, hypothesis: str, references: list[str]) -> _Scored: ...
    def get_signature(self) -> object: ...


def _sacrebleu(name: str, metric: _SentenceMetric) -> TextScore:
    def prepare(reference: str) -> str:
        _filled(reference.strip(), "text", reference)
        return reference

    def compare(prediction: str, reference: str) -> float:
        # Of 0 to 100; equal texts come to 100.00000000000004.
        return min(metric.sentence_score(prediction, [reference]).score / 100, 1.0)

    metric.sentence_score("", [""])  # there is no signature before the first score
    return _Score(f"{name}|{metric.get_signature()}", prepare, compare)


Found = TypeVar("Found", str, list[str])


def _filled(found: Found | None, what: str, reference: str) -> Found:
    if not found:
        raise ValueError(f"there is no {what} in the reference {shown(reference)}")
    return found


TEXT_METRICS: Mapping[str, TextMetric] = MappingProxyType(
    {
        "exact_match": TextMetric(
            "1 if the texts are equal up to white space and NFKC, else 0",
            lambda _: _exact_match(folded=False),
        ),
        "exact_match_folded": TextMetric(
            "exact match without case and punctuation",
            lambda _: _exact_match(folded=True),
        ),
        "regex_answer": TextMetric(
            "1 if the answers in the texts are equal: the last number, or a pattern's group",
            _regex_answer,
            takes_pattern=True,
        ),
        "rouge_l": TextMetric(
            "F1 of the longest common subsequence of words", lambda _: _rouge_l()
        ),
        "bleu": TextMetric(
            "sentence BLEU with effective order (sacrebleu), as a share of 1", lambda _: _bleu()
        ),
        "chrf": TextMetric(
            "F2 of character n-grams (sacrebleu), as a share of 1", lambda _: _chrf()
        ),
    }
)
"""Metric by name, as a record keeps it."""
