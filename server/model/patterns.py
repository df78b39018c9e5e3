"""Regular expressions out of a checkpoint, matched against module names within a time limit.

`re` can backtrack for years on a pattern of ten characters and cannot be stopped, and it holds the
interpreter, so one adapter would stop the server. The `regex` package reads the same patterns and
has a timeout; what it takes to compile is bounded by `bounded_regex`. Called by `adapter_config`.
"""

import re
import time
from typing import Literal

import regex

from boundary.bounded_regex import compile_bounded
from server.errors import AdapterError
from server.model.tensor_file import shown

MATCH_TIMEOUT_S = 0.25  # one pattern on one name: the interpreter is held meanwhile
TOTAL_TIMEOUT_S = 10.0  # all of a checkpoint's

_PLAIN = re.compile(r"[\w.]+")


class PatternMatcher:
    """Runs one checkpoint's patterns, each compiled once.

    `field` says where a pattern was written. Raises `AdapterError`, naming it, when the pattern is
    not valid or the time is up.
    """

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._plain: dict[str, bool] = {}
        self._spent_s = 0.0

    def ends(self, pattern: str, name: str, field: str) -> bool:
        """Tell whether `pattern` matches the end of `name`, from its start or from after a dot.

        A pattern of letters and dots needs no engine: EVA writes one for each module, and 900 of
        them on 900 names take 10 s as regular expressions, 1 s so.
        """
        start = time.monotonic()
        plain = self._plain.get(pattern)
        if plain is None:
            plain = self._plain[pattern] = _PLAIN.fullmatch(pattern) is not None
        if not plain:
            return self.match(rf"(.*\.)?({pattern})$", name, field) is not None
        rest = len(name) - len(pattern)
        found = (rest == 0 or (rest > 0 and name[rest - 1] == ".")) and all(
            p in (".", c) for p, c in zip(pattern, name[rest:], strict=True)
        )
        self._spend(start, field)
        return found

    def match(self, pattern: str, name: str, field: str) -> regex.Match[str] | None:
        """Match at the start of `name`."""
        return self._run("match", pattern, name, field)

    def fullmatch(self, pattern: str, name: str, field: str) -> regex.Match[str] | None:
        """Match all of `name`."""
        return self._run("fullmatch", pattern, name, field)

    def _run(
        self, how: Literal["match", "fullmatch"], pattern: str, name: str, field: str
    ) -> regex.Match[str] | None:
        start = time.monotonic()
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                compiled = self._compiled[pattern] = compile_bounded(pattern)
            run = compiled.match if how == "match" else compiled.fullmatch
            found = run(name, timeout=MATCH_TIMEOUT_S)
        except TimeoutError as error:
            raise AdapterError(
                f"{field}: the pattern {shown(pattern)} takes over {MATCH_TIMEOUT_S} s on {name!r}"
            ) from error
        except ValueError as error:
            raise AdapterError(f"{field}: {shown(pattern)} {error}") from error
        self._spend(start, field)
        return found

    def _spend(self, start: float, field: str) -> None:
        self._spent_s += time.monotonic() - start
        if self._spent_s > TOTAL_TIMEOUT_S:
            raise AdapterError(f"{field}: its patterns take over {TOTAL_TIMEOUT_S} s in all")
