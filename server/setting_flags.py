"""Settings as a command's flags: made of their fields, so that a new setting is a flag at once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from cyclopts import Group, Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.config import ModelSettings, variable
from server.environment import load_settings

Command = Callable[..., int]

_REPEATED = {"cors_origin": "ORIGIN", "adapter_source": "PREFIX", "adapter_scheme": "SCHEME"}


def with_settings(*sections: type[BaseModel]) -> Callable[[Command], Command]:
    """Give a command `f(settings, ...)` the flags of `sections`, and call it with the settings.

    Flags reach `load_settings` as they were typed: one place checks them, whatever layer they are
    from. Cyclopts reads the signature that is made here.
    """

    def decorate(command: Command) -> Command:
        def run(
            model: str | None = None, *rest: Any, config: Path | None = None, **given: Any
        ) -> int:
            own = {name: given.pop(name) for name in own_parameters if name in given}
            flags = {name: value for name, value in given.items() if value is not None}
            if model is not None:
                flags["model"] = model
            return command(load_settings(flags, config_file=config), *rest, **own)

        own_parameters = dict(list(inspect.signature(command).parameters.items())[1:])
        positional = [
            own_parameters.pop(name)
            for name, parameter in list(own_parameters.items())
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL
        ]
        run.__doc__, run.__name__, run.__annotations__ = command.__doc__, command.__name__, {}
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_model_argument(), *positional, *own_parameters.values(), _config_flag()]
            + [
                _flag(name, field, Group((section.__doc__ or "").rstrip("."), sort_key=index))
                for index, section in enumerate(sections, start=1)
                for name, field in section.model_fields.items()
                if name != "model" and name not in own_parameters
            ]
        )
        return run

    return decorate


def _model_argument() -> inspect.Parameter:
    text = f"{ModelSettings.model_fields['model'].description} [{variable('model')}]"
    return inspect.Parameter(
        "model",
        inspect.Parameter.POSITIONAL_ONLY,
        default=None,
        annotation=Annotated[str | None, Parameter(help=text)],
    )


def _config_flag() -> inspect.Parameter:
    text = f"TOML file of settings. [{variable('config')}]"
    return inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, Parameter(help=text)],
    )


def _flag(name: str, field: FieldInfo, group: Group) -> inspect.Parameter:
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None or default in ({}, ()) else f" (default: {default})"
    kind: Any = field.annotation
    metavar = None
    if name == "adapter":
        kind, metavar = list[str], "NAME=PATH"
    elif name in _REPEATED:
        kind, metavar = list[str], _REPEATED[name]
    elif kind is not bool and get_origin(kind) is not Literal:
        kind, metavar = str, _metavar(name, field)
    text = f"{field.description}{shown} [{variable(name)}]"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, Parameter(help=text, group=group, metavar=metavar)],
    )


def _metavar(name: str, field: FieldInfo) -> str:
    if name.endswith("_bytes"):
        return "SIZE"
    if name.endswith("_file"):
        return "FILE"
    annotation = str(field.annotation)
    for word, metavar in (("int", "INT"), ("float", "SECONDS"), ("Path", "DIR")):
        if word in annotation:
            return metavar
    return "TEXT"
