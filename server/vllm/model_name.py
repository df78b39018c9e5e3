"""`adapter@12` on vLLM's wire, as an adapter's name and a depth. Knows no disk but what it is told."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from server.confined import is_plain_name
from server.errors import BadRequest

Depth = int | Literal["auto", "full"]

_INTEGER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model's name asks for; no depth: the default."""

    adapter: str
    depth: Depth | None


def parse(model: str, is_adapter: Callable[[str], bool]) -> Asked | None:
    """Tell adapter and depth; None if there is no such adapter, whatever the depth.

    An adapter whose own name holds an `@` is taken whole. Raises BadRequest for a depth that is none.
    """
    if is_plain_name(model) and is_adapter(model):
        return Asked(model, None)
    name, at, suffix = model.rpartition("@")
    if not at or not is_plain_name(name) or not is_adapter(name):
        return None
    if suffix == "auto" or suffix == "full":
        return Asked(name, "auto" if suffix == "auto" else "full")
    if not _INTEGER.fullmatch(suffix):
        raise BadRequest(
            f"the depth after '@' must be a number of layers, 'auto' or 'full'; got {suffix[:60]!r}"
        )
    return Asked(name, int(suffix))
