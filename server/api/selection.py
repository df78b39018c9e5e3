"""`model` and `lora_depth` on the wire -> the adapter and depth of a request.

`model` is the base model's id, an adapter's name, or `base:adapter`; each may end in `@DEPTH`. A
name that contains `@` and is loaded is taken whole.
"""

import re
from typing import Literal

from server.access.key import Grant
from server.engine.protocol import Engine
from server.engine.request import LoraSelection
from server.errors import BadRequest

WireDepth = int | Literal["auto", "full"]

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


async def select(
    engine: Engine, model: str, depth: WireDepth | None, grant: Grant
) -> LoraSelection:
    """Resolve what a client wrote, within what its key may use.

    Raises NotFound, BadRequest, and Forbidden: for a depth once `auto` and `full` are numbers.
    """
    selection = await resolve(engine, model, depth, grant)
    grant.check_depth(selection)
    return selection


async def resolve(
    engine: Engine, model: str, depth: WireDepth | None, grant: Grant
) -> LoraSelection:
    """The same at any depth. A model that the key may not use is not even looked for."""
    name, suffix = split_model(engine, model)
    grant.check_model(name)
    if suffix is not None and depth is not None and suffix != depth:
        raise BadRequest(
            f"'lora_depth' {depth!r} disagrees with the depth {suffix!r} in model {model!r}",
            param="lora_depth",
        )
    return await engine.select(name, depth if suffix is None else suffix)


def split_model(engine: Engine, model: str) -> tuple[str, WireDepth | None]:
    """`base:name@DEPTH` -> name and depth; None where there is no suffix."""
    if _is_known(engine, model):
        return model, None
    name = model.removeprefix(f"{engine.info.name}:")
    if "@" not in name or _is_known(engine, name):
        return name, None
    name, _, suffix = name.rpartition("@")
    return name, _depth(suffix, model)


def _is_known(engine: Engine, name: str) -> bool:
    return name == engine.info.name or engine.adapter(name) is not None


def _depth(suffix: str, model: str) -> WireDepth:
    if suffix == "auto" or suffix == "full":
        return "auto" if suffix == "auto" else "full"
    if not _INTEGER.fullmatch(suffix):
        raise BadRequest(
            f"the depth after '@' must be an integer, 'auto' or 'full' (got {suffix!r} in model "
            f"{model!r})",
            param="model",
        )
    return int(suffix)
