"""The base of every wire model: nothing unknown, nothing coerced, nothing ignored.

Strict types mean that `"1"` is not a number and `true` is not an integer. A field that OpenAI or a
peer server knows and this one does not honour is named in `unsupported` with the reason, which
makes a better answer than "unknown field". `null` says the same as leaving a field out.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """A wire model whose unknown fields and wrong types are errors that name them."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, str]] = {}
    """Fields that are known and refused, each with the reason or with what to use instead."""
    accepted: ClassVar[frozenset[str]] = frozenset()
    """Names on the wire; filled in for each class."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Note the wire names once, for the check of every body."""
        cls.accepted = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, fields: Any) -> Any:
        """Stops at the first unknown name, so that a body full of them costs one error."""
        if not isinstance(fields, dict):
            return fields
        for name, value in fields.items():
            if name in cls.unsupported:
                if value is not None:
                    raise PydanticCustomError(
                        "unsupported_field", "{why}", {"name": name, "why": cls.unsupported[name]}
                    )
            elif name not in cls.accepted:
                raise PydanticCustomError("unknown_field", "unknown field", {"name": name})
        if cls.unsupported.keys().isdisjoint(fields):
            return fields
        return {name: value for name, value in fields.items() if name not in cls.unsupported}
