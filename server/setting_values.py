"""How settings are spelt: a flag, a variable and a TOML key may give one value in different words.

Each `parse_*` takes what was given and returns what its field checks further; a ValueError says what it
should be.
"""

import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator

from server.sources.location import RemoteAdapter, checked_prefix, checked_scheme, parse

_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


def parse_bytes(value: object) -> object:
    """`2GiB`, `512 MB` or a plain number, as bytes. Other values are left to the field's own check.

    Not pydantic's `ByteSize`: it reads the start of the text and drops the rest ("1,5GiB" is 1).
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError("should be a number of bytes, or one with a unit such as 512MiB or 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def parse_adapters(value: object) -> object:
    """`NAME=PATH` items, as a list, one comma-separated string or a JSON object."""
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"is not valid JSON: {error}") from None
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return value
    adapters: dict[str, str] = {}
    for item in value:
        name, separator, path = str(item).partition("=")
        if not separator or not path.strip():
            raise ValueError(f"should be NAME=PATH, not {item!r}")
        if name.strip() in adapters:
            raise ValueError(f"names {name.strip()!r} twice")
        adapters[name.strip()] = path.strip()
    return adapters


def parse_place(value: object) -> Path | RemoteAdapter:
    """A directory, or where else an adapter lies."""
    if isinstance(value, Path | RemoteAdapter):
        return value
    if not isinstance(value, str):
        raise ValueError("should be a path, hf://ORG/NAME or s3://BUCKET/PREFIX")
    return parse(value)


def parse_words(value: object) -> object:
    """A list, or one comma-separated string."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    return value


def parse_prefixes(value: object) -> object:
    """Prefixes of remote adapters, each in its one spelling."""
    value = parse_words(value)
    if not isinstance(value, list | tuple) or not all(isinstance(prefix, str) for prefix in value):
        return value
    return tuple(map(checked_prefix, value))


def parse_schemes(value: object) -> object:
    """Schemes of fsspec's, such as gs."""
    value = parse_words(value)
    if not isinstance(value, list | tuple) or not all(isinstance(scheme, str) for scheme in value):
        return value
    for scheme in value:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            raise ValueError(f"should be schemes such as gs, without ://; not {scheme!r}")
    return tuple(map(checked_scheme, value))


def parse_origins(value: object) -> object:
    """Origins, as a list or as one comma-separated string."""
    value = parse_words(value)
    if not isinstance(value, list | tuple):
        return value
    for origin in value:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", str(origin)):
            raise ValueError(f"should be origins such as https://app.example, or *; not {origin!r}")
    return tuple(value)


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Place = Annotated[Path | RemoteAdapter, PlainValidator(parse_place)]
Adapters = Annotated[dict[str, Place], BeforeValidator(parse_adapters)]
Prefixes = Annotated[tuple[str, ...], BeforeValidator(parse_prefixes)]
Schemes = Annotated[tuple[str, ...], BeforeValidator(parse_schemes)]
Origins = Annotated[tuple[str, ...], BeforeValidator(parse_origins)]
Word = Annotated[str, Field(min_length=1)]
