"""A key: who somebody is, what the key opens, and what it may be used for.

Knows neither how keys are kept nor HTTP. Every source of keys (flags, file, database) makes these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from server.engine.request import LoraSelection
from server.errors import Forbidden

Scope = Literal["api", "admin"]
Source = Literal["flag", "file", "database"]

MAX_PER_MINUTE = 10**12


class Grant(BaseModel):
    """What a key may be used for; None is no limit. Raises ValidationError, each error by its field."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    adapters: tuple[str, ...] | None = None
    """Names and shell patterns of models that may be asked for; the base model is one of them."""
    max_depth: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """The deepest `lora_depth`, in layers."""
    requests_per_minute: Annotated[int, Field(ge=1, le=MAX_PER_MINUTE)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=MAX_PER_MINUTE)] | None = None

    @field_validator("adapters", mode="before")
    @classmethod
    def _a_json_array_is_a_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("adapters")
    @classmethod
    def _patterns_are_words(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("an empty list would allow nothing; leave it out to allow every model")
        for pattern in value or ():
            if not pattern or len(pattern) > 256 or not pattern.isprintable():
                raise ValueError(
                    "each should be a name or pattern of 1 to 256 printable characters"
                )
        return value

    def check_model(self, name: str) -> None:
        """Raises Forbidden, in the same words whether there is such a model or not."""
        if not self.allows(name):
            raise Forbidden(
                f"this key may not use the model {name!r}; GET /v1/models lists what it may",
                param="model",
                code="model_not_allowed",
            )

    def allows(self, name: str) -> bool:
        """Whether a base model or adapter of this name may be asked for."""
        return self.adapters is None or any(fnmatchcase(name, each) for each in self.adapters)

    def check_depth(self, selection: LoraSelection) -> None:
        """Raises Forbidden for a depth above the limit, whoever or whatever chose it."""
        if self.max_depth is None or selection.depth <= self.max_depth:
            return
        chosen = {
            "request": "",
            "calibrated": ", which the adapter is calibrated to",
            "full": ", which is the whole adapter",
            "base": "",
        }[selection.source]
        raise Forbidden(
            f"this key may use 'lora_depth' from 0 to {self.max_depth} "
            f"(got {selection.depth}{chosen})",
            param="lora_depth",
            code="depth_not_allowed",
        )

    def described(self) -> Mapping[str, Any]:
        """The limits that there are, as JSON."""
        return self.model_dump(mode="json", exclude_none=True)


class NewKey(BaseModel):
    """What a key is made of besides its secret. Raises ValidationError, each error by its field."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """For people; need not be unique."""
    scope: Scope = "api"
    grant: Grant = Grant()

    @field_validator("name")
    @classmethod
    def _name_is_one_line(cls, value: str) -> str:
        if not value.isprintable() or value != value.strip():
            raise ValueError("should be one line of printable characters, without spaces around it")
        return value

    @model_validator(mode="after")
    def _an_admin_key_asks_for_nothing(self) -> Self:
        if self.scope == "admin" and self.grant != Grant():
            raise ValueError("an admin key has no limits: it opens /admin and not /v1")
        return self


@dataclass(frozen=True, slots=True)
class Key:
    """Whoever is behind a request.

    id: what usage is counted by; `api-key` and `admin-key` for those of the flags, `none` for
    somebody who needed no key.
    """

    id: str
    name: str
    scope: Scope
    grant: Grant
    source: Source | None


def problem(error: ValidationError) -> tuple[str, str]:
    """The first thing wrong with a Grant or a key: its field, with dots, and why in words.

    No field where it is the whole. Shows nothing of the value.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return field, first["msg"].removeprefix("Value error, ")


NOBODY = Key("none", "no key", "api", Grant(), None)
"""Whoever asks a server that needs no key."""
