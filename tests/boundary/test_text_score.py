"""Text metrics beside their published implementations, and by hand where there is none."""

import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from boundary.text_score import (
    TEXT_METRICS,
    common_subsequence_length,
    normalized,
    text_score,
    words,
)

ROOT = Path(__file__).parents[2]
EVERY = pytest.mark.parametrize("name", TEXT_METRICS)


def sentences() -> list[str]:
    """Real English: what this project says of itself."""
    pages = [ROOT / "README.md", *sorted((ROOT / "server" / "docs").glob("*.md"))]
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.:])\s+|\n\n", text)]
    return [part for part in found if len(part) > 20 and part.isascii()]


def pairs(num_pairs: int) -> list[tuple[str, str]]:
    """Sentences beside others, beside themselves with words dropped, and with words swapped."""
    rng = random.Random(0)
    known = sentences()
    found = []
    for index in range(num_pairs):
        one = rng.choice(known)
        tokens = one.split()
        if index % 3 == 0:
            other = rng.choice(known)
        elif index % 3 == 1:
            other = " ".join(token for token in tokens if rng.random() < 0.7)
        else:
            rng.shuffle(tokens)
            other = " ".join(tokens)
        found.append((other, one))
    return found


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, start=1):
        for j, b in enumerate(other, start=1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
            )
    return table[-1][-1]


# What all have in common.


@EVERY
@given(
    prediction=st.text(max_size=30),
    reference=st.text(max_size=30).map(lambda text: f"{text} word 7"),
)
@settings(max_examples=50, deadline=None)
def test_scores_lie_between_0_and_1(name: str, prediction: str, reference: str) -> None:
    score = text_score(name)
    assert 0 <= score(prediction, reference) <= 1
    assert score(reference, reference) == pytest.approx(1, abs=1e-12)


@EVERY
def test_a_better_text_scores_higher(name: str) -> None:
    score = text_score(name)
    reference = "The price of the two tickets is 18 dollars."
    assert score("A duck lives on the river Cam, 5 miles away.", reference) < score(
        "The price of the two tickets is 18 dollars", reference
    ) or name.startswith("exact")
    assert score(reference, reference) == 1
    assert score("", reference) == 0


@EVERY
def test_a_reference_without_content_is_refused_with_its_sample(name: str) -> None:
    score = text_score(name)
    score.check(["one 1", "two 2"])
    with pytest.raises(ValueError, match=r"^sample 2: there is no \w+ in the reference ' \\n'$"):
        score.check(["one 1", "two 2", " \n", ""])
    with pytest.raises(ValueError, match=r"^there is no \w+ in the reference ' \\n'$"):
        score("one 1", " \n")


@EVERY
def test_a_metric_says_how_it_is_computed(name: str) -> None:
    assert text_score(name).signature.startswith(f"{name}|") or name == "exact_match_folded"
    assert TEXT_METRICS[name].description


def test_signatures_tell_metrics_apart() -> None:
    signatures = [text_score(name).signature for name in TEXT_METRICS]
    signatures.append(text_score("regex_answer", pattern=r"(\d)").signature)
    assert len(set(signatures)) == len(signatures)
    assert "tok:13a" in text_score("bleu").signature
    assert "eff:yes" in text_score("bleu").signature
    assert re.search(r"version:\d", text_score("chrf").signature)


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'rouge'; known are exact_match, .*chrf"):
        text_score("rouge")


@EVERY
def test_only_the_metric_that_extracts_takes_a_pattern(name: str) -> None:
    if name == "regex_answer":
        assert text_score(name, pattern="(x)")("x", "x") == 1
    else:
        with pytest.raises(ValueError, match=f"metric '{name}' takes no pattern"):
            text_score(name, pattern="(x)")


def test_sacrebleu_is_imported_only_when_it_is_asked_for() -> None:
    code = (
        "import sys; from boundary.text_score import text_score; text_score('rouge_l');"
        "assert 'sacrebleu' not in sys.modules; assert 'torch' not in sys.modules;"
        "text_score('chrf'); assert 'sacrebleu' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Exact match.


@pytest.mark.parametrize(
    ("prediction", "reference", "plain", "folded"),
    [
        ("  a\n b ", "a b", 1, 1),
        ("\uff21\ufb01", "Afi", 1, 1),  # full-width letter, ligature
        ("e\u0301", "\u00e9", 1, 1),
        ("Paris", "paris", 0, 1),
        ("STRASSE", "stra\u00dfe", 0, 1),
        ("Paris.", "Paris", 0, 1),
        ("don't", "dont", 0, 1),
        ("«Oui»", "oui", 0, 1),
        ("$5", "5", 0, 1),
        ("the cat", "cat", 0, 0),  # articles stay
        ("well-known", "well known", 0, 0),
        ("a", "b", 0, 0),
        ("", "a", 0, 0),
    ],
)
def test_exact_match(prediction: str, reference: str, plain: int, folded: int) -> None:
    assert text_score("exact_match")(prediction, reference) == plain
    assert text_score("exact_match_folded")(prediction, reference) == folded


@given(st.text(max_size=50), st.booleans())
@example("e.\u0301", True)  # only without the dot do they combine
@settings(deadline=None)
def test_what_is_normalized_stays_as_it_is(text: str, folded: bool) -> None:
    once = normalized(text, folded=folded)
    assert normalized(once, folded=folded) == once


# ROUGE-L.


def test_rouge_l_equals_rouge_score_on_real_text() -> None:
    oracle = RougeScorer(["rougeL"])
    score = text_score("rouge_l")
    seen = set()
    for prediction, reference in pairs(300):
        expected = oracle.score(reference, prediction)["rougeL"].fmeasure
        assert score(prediction, reference) == pytest.approx(expected, abs=1e-12)
        seen.add(round(expected, 3))
    assert len(seen) > 100  # not all 0 and 1


@given(
    st.text("ab AB1_-.\t\n\x00", max_size=40),
    st.text("ab AB1_-.\t\n\x00", max_size=40).filter(words),
)
@settings(deadline=None)
def test_rouge_l_equals_rouge_score_on_ascii(prediction: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert text_score("rouge_l")(prediction, reference) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from("abcd"), max_size=80), st.lists(st.sampled_from("abcd")))
@settings(deadline=None)
def test_the_common_subsequence_is_the_tables(one: list[str], other: list[str]) -> None:
    assert common_subsequence_length(one, other) == longest_common_subsequence(one, other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Das Café, naïve_x!", ["das", "café", "naïve", "x"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are no gaps
        ("中文abc 2024年", ["中", "文", "abc", "2024", "年"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("1,000.5", ["1", "000", "5"]),
        ("... 👍", []),
    ],
)
def test_words_of_every_script_count(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_rouge_score_does_not_see_what_ours_counts() -> None:
    oracle = RougeScorer(["rougeL"])
    assert oracle.score("привет мир", "привет мир")["rougeL"].fmeasure == 0
    assert text_score("rouge_l")("привет мир", "привет мир") == 1
    assert oracle.score("caf\u00e9", "cafe")["rougeL"].fmeasure == 0
    assert oracle.score("caf\u00e9", "caf")["rougeL"].fmeasure == 1
    assert text_score("rouge_l")("caf", "caf\u00e9") == 0


# BLEU and chrF.


def test_bleu_and_chrf_are_sacrebleus_sentence_scores() -> None:
    bleu, chrf = BLEU(effective_order=True), CHRF()
    for prediction, reference in pairs(60):
        expected = bleu.sentence_score(prediction, [reference]).score / 100
        assert text_score("bleu")(prediction, reference) == pytest.approx(expected, abs=1e-9)
        expected = chrf.sentence_score(prediction, [reference]).score / 100
        assert text_score("chrf")(prediction, reference) == pytest.approx(expected, abs=1e-9)


def test_short_texts_can_reach_a_bleu_of_1() -> None:
    """Without effective order two words, which hold no 4-gram, score near 0."""
    assert text_score("bleu")("blue spice", "blue spice") == 1
    assert BLEU().corpus_score(["blue spice"], [["blue spice"]]).score < 1


# Answers.

GSM8K = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer\u2019s market.\n#### 18"
)


@pytest.mark.parametrize(
    ("prediction", "is_right"),
    [
        ("#### 18", True),
        ("9 * 2 = 18.", True),
        ("So the answer is $18.00, which is more than 5.", True),
        ("The Answer Is: 18\nQ: how old is 7?", True),
        ("#### 9\n#### 18", True),
        ("#### 18\n#### 9", False),
        ("#### none\nI say 18", True),
        ("18 eggs, no, 17", False),
        ("-18", False),
        ("3-18", True),  # a difference, no sign
        ("\uff11\uff18", True),  # full width
        ("118", False),
        ("", False),
        ("eighteen", False),
    ],
)
def test_the_last_number_is_the_answer(prediction: str, is_right: bool) -> None:
    assert text_score("regex_answer")(prediction, GSM8K) == is_right


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        ("#### 1,080", "1080", True),
        ("#### 1,00,000", "100000", True),
        ("numbers 1,2,3", "3", True),
        ("#### -5", "\u22125", True),
        ("-$5", "$-5", True),
        (".5", "0.50", True),
        ("5.", "5", True),
        ("1,080", "80", False),
        ("5", "-5", False),
        ("9" * 400, "9" * 399 + "8", False),
    ],
)
def test_numbers_are_compared_as_numbers(one: str, other: str, is_equal: bool) -> None:
    assert text_score("regex_answer")(one, other) == is_equal
    assert text_score("regex_answer")(other, one) == is_equal


def test_a_pattern_gives_the_last_match_in_which_its_group_is_filled() -> None:
    score = text_score("regex_answer", pattern=r"label: *(\w*)")
    assert score("label: a, label:  b", "label: b") == 1
    assert score("label: a, label:  b", "label: a") == 0
    assert score("label: b. label: ", "label: b") == 1
    assert score("b", "label: b") == 0
    with pytest.raises(ValueError, match="sample 1: there is no answer in the reference 'b'"):
        score.check(["label: b", "b"])


def test_a_patterns_answers_are_compared_without_regard_to_white_space() -> None:
    score = text_score("regex_answer", pattern="<(.*)>")
    assert score("< a  b >", "<a b>") == 1
    assert score("<1,080>", "<$1080.0>") == 1
    assert score("<a,b>", "<ab>") == 0


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no usable pattern"),
        (r"(\L<names>)", "no usable pattern"),
        ("a", "one group, the answer; it has 0"),
        ("(a)(b)", "one group, the answer; it has 2"),
        ("(" + "a" * 500 + ")", "502 characters are over the limit of 500"),
        ("((?:(?:a{999}){999}){999})", "product is over 1000"),
        ("((?:(?:a{99,}){99}){99,100})", "product is over"),
        ("(?x)(a{9 9 9 9 9})", "flag x"),
        ("(?i-x:(a))", "flag x"),
    ],
)
def test_an_unusable_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^pattern: .*{re.escape(message)}"):
        text_score("regex_answer", pattern=pattern)


def test_a_name_with_an_x_is_no_flag() -> None:
    assert text_score("regex_answer", pattern="(?P<max>a)")("a", "a") == 1


def test_a_pattern_that_backtracks_is_stopped() -> None:
    score = text_score("regex_answer", pattern=r"((?:a|aa)+)$")
    assert score("aaa", "aaa") == 1
    with pytest.raises(ValueError, match=r"pattern: .* takes over 0.25 s on 'aaaa"):
        score("a" * 5000 + "!", "aaa")


def test_a_pattern_that_is_slow_on_every_text_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says how much processor time each text took."""
    now = 0.0

    def thread_time() -> float:
        nonlocal now
        now += 0.1
        return now

    score = text_score("regex_answer", pattern="(a)")
    monkeypatch.setattr("boundary.answer.time.thread_time", thread_time)
    with pytest.raises(ValueError, match=r"takes over 0.01 s a text"):
        score.check(["a"] * 12)  # 12 times 0.1 s are over 1 + 12 * 0.01
    score = text_score("regex_answer", pattern="(a)")
    score.check(["a"] * 11)


def test_a_pattern_gives_up_the_interpreters_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = regex.compile("(a)")
    seen = {}

    class Spy:
        groups = 1

        def finditer(self, text: str, **options: object) -> object:
            seen.update(options)
            return compiled.finditer(text)

    monkeypatch.setattr("boundary.answer.regex.compile", lambda *_, **__: Spy())
    assert text_score("regex_answer", pattern="(a)")("a", "a") == 1
    assert seen["concurrent"] is True
    assert seen["timeout"] == 0.25
