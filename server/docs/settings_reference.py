"""`settings.md`: every setting with its flag, variable, default and meaning, from `server/config.py`."""

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.config import (
    AdapterSettings,
    EngineSettings,
    HttpSettings,
    ModelSettings,
    StoreSettings,
    flag,
    variable,
)

SECTIONS: tuple[type[BaseModel], ...] = (
    ModelSettings,
    AdapterSettings,
    EngineSettings,
    StoreSettings,
    HttpSettings,
)

_OPENING = """\
# Settings

<!-- Written by `python -m server.docs` from server/config.py. -->

Every setting can be a flag, an environment variable or a key of a TOML file (`--config FILE` or
`FATHOM_CONFIG`), in this order of precedence. The TOML keys are the flags' names with underscores, and
adapters are a table: `[adapter]`, `support = "./adapters/support"`. An unknown key, an unknown
`FATHOM_` variable and a bad value stop the start with their name. Sizes take units (`512MiB`, `2GiB`).
A layer replaces a setting whole: adapters named by flags are not added to those of the file.

`fathom serve` takes all of them, `generate`, `calibrate` and `bench` the first three groups, `adapters` the
first two, and `doctor` the first.
"""


def settings_reference() -> str:
    """The page as Markdown."""
    return "\n".join([_OPENING, *(line for section in SECTIONS for line in _table(section))])


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield f"## {(section.__doc__ or '').rstrip('.')}\n"
    yield "| flag | variable | default | |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        yield f"| `{flag(name)}` | `{variable(name)}` | {_default(field)} | {field.description} |"
    yield ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ({}, ()):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
