"""The answer that a text gives, found by a regular expression: GSM8K's number, or anybody's own.

Patterns come from strangers, and the `regex` package is no safer than its caller: a short pattern
can backtrack for years. So length, time on a text and time on all texts are bounded, and what it takes
to compile by `bounded_regex`. Used by `text_score`.
"""

import time
import unicodedata
from collections.abc import Callable
from decimal import Decimal

import regex

from boundary.bounded_regex import compile_bounded
from boundary.strict_json import shown

MAX_PATTERN_CHARS = 500
MATCH_TIMEOUT_S = 0.25
ALLOWANCE_S = 1.0
ALLOWANCE_PER_TEXT_S = 0.01
"""Processor time on all texts together: at 100,000 texts, 17 minutes instead of 7 hours."""

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)"
_NUMBER = rf"((?:(?<![\w)])[-+])?\p{{Sc}}?(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+))"
_MARKED_NUMBER = regex.compile(rf"(?:####|\banswer\s+is\b)[^0-9\n]{{0,80}}?{_NUMBER}", regex.I)
_ANY_NUMBER = regex.compile(_NUMBER)
_PLAIN_NUMBER = regex.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_CURRENCY = regex.compile(r"\p{Sc}")

Extract = Callable[[str], str | None]


def last_number(text: str) -> str | None:
    """The number after the last `####` or "answer is", on its line; without one, the last number.

    Thousands' commas and currency signs may be in it; "3 - 2" and "3-2" end in 2, "is -2" in -2.
    """
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    for pattern in (_MARKED_NUMBER, _ANY_NUMBER):
        found = pattern.findall(text)
        if found:
            return str(found[-1])
    return None


class PatternAnswer:
    """A stranger's pattern, within limits.

    Raises ValueError if it is too long, does not compile, or has not exactly one group.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError(
                f"pattern: {len(pattern)} characters are over the limit of {MAX_PATTERN_CHARS}"
            )
        try:
            self._compiled = compile_bounded(pattern)
        except ValueError as error:
            raise ValueError(f"pattern: {shown(pattern)} {error}") from None
        if self._compiled.groups != 1:
            raise ValueError(
                f"pattern: {shown(pattern)} must have one group, the answer; it has"
                f" {self._compiled.groups}"
            )
        self._pattern = pattern
        self._spent_s = 0.0
        self._allowed_s = ALLOWANCE_S

    def __call__(self, text: str) -> str | None:
        """The group of the last match in which it is not blank; None if there is no such match.

        Raises ValueError if that takes too long on this text, or on all texts so far.
        """
        start = time.thread_time()
        answer = None
        try:
            # Concurrent: without the interpreter's lock, so that a server goes on meanwhile.
            for match in self._compiled.finditer(text, timeout=MATCH_TIMEOUT_S, concurrent=True):
                if match[1] is not None and match[1].strip():
                    answer = str(match[1])
        except TimeoutError:
            raise ValueError(
                f"pattern: {shown(self._pattern)} takes over {MATCH_TIMEOUT_S} s on {shown(text)}"
            ) from None
        self._spent_s += time.thread_time() - start
        self._allowed_s += ALLOWANCE_PER_TEXT_S
        if self._spent_s > self._allowed_s:
            raise ValueError(
                f"pattern: {shown(self._pattern)} takes over {ALLOWANCE_PER_TEXT_S} s a text"
            )
        return answer


def canonical_answer(answer: str) -> str | Decimal:
    """What two answers are compared as: the number where it is one, so that 1,080.0 is 1080.

    Commas and a currency sign go before that is asked. Other answers: NFKC, white space collapsed.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).split())
    bare = _CURRENCY.sub("", text.replace("\N{MINUS SIGN}", "-")).replace(",", "").rstrip(".")
    return Decimal(bare) if _PLAIN_NUMBER.fullmatch(bare) else text
