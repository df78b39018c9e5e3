"""JSON from clients, read without forgiving: a body, and the JSON that some fields hold as a text."""

import json
import re
from itertools import accumulate
from typing import Any, NoReturn

from server.errors import BadRequest

MAX_SHOWN = 100
"""Characters of a refused value, or of a field's path, that an error message repeats."""

MAX_NESTING = 128
"""How deep lists and objects may lie in each other: the same as readers of JSON schemas take."""

# Possessive, and to the end where it never ends, so that no text takes longer than its length.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def json_text(text: str) -> Any:
    """Strict JSON: no NaN, no Infinity, no repeated key, no lone surrogate, no deep nesting.

    Raises BadRequest, whose message is a sentence's end, about the text.
    """
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(text) > MAX_NESTING:
        raise _bad_json(f"is nested too deeply: more than {MAX_NESTING} lists and objects")
    try:
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _bad_json(
            f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except UnicodeEncodeError:
        raise _bad_json("holds a lone surrogate, which is no Unicode text") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise _bad_json(f"holds a number that cannot be read: {error}") from None
    return content


def shown(value: object) -> str:
    """A value as an error message repeats it: its JSON-like form, cut when it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _nesting(text: str) -> int:
    """The deepest nesting, counted without recursion; of what is no JSON, some number."""
    brackets = _BRACKET.findall(_STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _no_constant(name: str) -> NoReturn:
    raise _bad_json(f"holds {name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in pairs:
        if name in keys:
            raise BadRequest(f"gives field {shown(name)} more than once", param=name[:MAX_SHOWN])
        keys[name] = value
    return keys


def _bad_json(what: str) -> BadRequest:
    return BadRequest(what, code="invalid_json")
