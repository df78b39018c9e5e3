"""JSON that people hand in, read without forgiving: what is not plain JSON is a ValueError.

Python's reader takes NaN, keeps the last of two equal keys and lets half a surrogate pair through;
none of these means what its writer meant. Used by `dataset` and `record`, which raise their own.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MAX_SHOWN = 60
"""Characters of a stranger's text that an error message repeats."""


def read_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a regular file (or a link to one); never blocks on a pipe or device.

    Raises ValueError, which names the file, if it cannot be read or is over the limit.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path.name!r} cannot be opened: {why}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path.name!r} is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path.name!r} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name!r} is over the limit of {max_bytes} bytes")
    return content


def parse(data: bytes) -> Any:
    """The value of one JSON text in UTF-8; raises ValueError that says what is wrong with it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"is not UTF-8: {what}") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        if "\\ud" in text or "\\uD" in text:
            canonical(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def canonical(value: Any) -> bytes:
    """One text for a value, whatever the order of its keys; ValueError if it is not JSON."""
    try:
        text = json.dumps(
            value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no Unicode text") from None


def shown(value: object) -> str:
    """A value as an error message repeats it, cut when it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"gives {shown(name)} more than once")
        fields[name] = value
    return fields
