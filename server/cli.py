"""The `fathom` command line. Every setting is a flag; commands live in modules of their own names.

Those modules load torch, so each is imported when its command runs: `fathom --help` stays quick.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from cyclopts import App, Group, Parameter
from cyclopts.validators import Number
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server import __version__, command_line
from server.bench.options import BenchOptions
from server.config import (
    AdapterSettings,
    ConfigError,
    EngineSettings,
    HttpSettings,
    ModelSettings,
    Settings,
    StoreSettings,
    variable,
)
from server.environment import load_settings

app = App(
    name="fathom",
    version=__version__,
    help="Serve one base language model with many LoRA adapters, each request at its own depth.",
    default_parameter=Parameter(negative_iterable=()),
)

LOCAL = (ModelSettings, AdapterSettings, EngineSettings)
SERVER = (*LOCAL, StoreSettings, HttpSettings)
_REPEATED = {"cors_origin": "ORIGIN", "adapter_source": "PREFIX", "adapter_scheme": "SCHEME"}
_BENCH_DEFAULTS = BenchOptions()

Command = Callable[..., int]


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


@app.command
@with_settings(*SERVER)
def serve(settings: Settings) -> int:
    """Serve MODEL and its adapters to OpenAI clients, on the loopback address unless told else."""
    from server.serve import serve as run

    return run(settings)


@app.command
@with_settings(*LOCAL)
def generate(
    settings: Settings,
    *,
    prompt: Annotated[str, Parameter(help="The text to continue, or the user's message.")],
    name: Annotated[
        list[str] | None, Parameter(help="An adapter to ask, the first by default; repeatable.")
    ] = None,
    depth: Annotated[
        list[str] | None,
        Parameter(
            help="Depths: numbers, auto or full; repeatable. Default: 0, a middle one, full."
        ),
    ] = None,
    max_tokens: Annotated[int, Parameter(validator=Number(gte=1), help="Length at most.")] = 64,
    temperature: Annotated[float, Parameter(validator=Number(gte=0), help="0 is greedy.")] = 0.0,
    seed: Annotated[int, Parameter(help="The same at every depth.")] = 0,
    chat: Annotated[
        bool, Parameter(negative=(), help="Send the prompt through the chat template.")
    ] = False,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of columns.")] = False,
) -> int:
    """Continue one prompt at several depths in one batch, and show where the texts part."""
    from server.engine.request import SamplingParams
    from server.generate import generate as run

    return run(
        settings,
        prompt=prompt,
        names=name or (),
        depths=depth or (),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed),
        chat=chat,
        as_json=json,
    )


@app.command
@with_settings(ModelSettings, AdapterSettings)
def adapters(
    settings: Settings,
    *,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Show each adapter's rank, modules, reach and digest, or why it is refused."""
    from server.adapters import adapters as run

    return run(settings, as_json=json)


@app.command
def export(
    adapter: Annotated[
        str, Parameter(help="Directory of a PEFT checkpoint, or hf://ORG/NAME, s3://BUCKET/PREFIX.")
    ],
    /,
    *,
    depth: Annotated[
        str, Parameter(help="A number, full, or auto: the one in boundary.json, given --model.")
    ],
    out: Annotated[Path, Parameter(help="Directory to write, missing or empty.")],
    model: Annotated[
        str | None,
        Parameter(help="Base model, which knows the number of layers and what auto is worth."),
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Cut ADAPTER at a depth: a plain PEFT checkpoint, for anyone to load without Fathom."""
    from server.export import export as run

    return run(adapter, depth=depth, out=out, model=model, as_json=json)


@app.command
@with_settings(*LOCAL)
def calibrate(
    settings: Settings,
    *adapters: Annotated[
        str, Parameter(help="Directories of PEFT checkpoints, hf://ORG/NAME or s3://BUCKET/PREFIX.")
    ],
    name: Annotated[
        list[str] | None,
        Parameter(help="An adapter by its name; repeatable. Default: all that are given."),
    ] = None,
    data: Annotated[
        list[str] | None,
        Parameter(
            help="Samples as JSONL, FILE or NAME=FILE; default: valid.jsonl beside the weights."
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        Parameter(help="Other samples to score the chosen depth with; FILE or NAME=FILE."),
    ] = None,
    metric: Annotated[
        str,
        Parameter(
            help="log_likelihood, kl_to_full, exact_match, regex_answer, rouge_l, bleu or chrf."
        ),
    ] = "log_likelihood",
    method: Annotated[
        Literal["sweep", "lens"], Parameter(help="What proposes the depth; scores confirm it.")
    ] = "sweep",
    tolerance: Annotated[
        float,
        Parameter(
            validator=Number(gte=0), help="Loss of score that is not worth a deeper adapter."
        ),
    ] = 0.0,
    relative: Annotated[
        bool, Parameter(negative=(), help="The tolerance is a share of the adapter's gain.")
    ] = False,
    confidence: Annotated[
        float, Parameter(validator=Number(gte=0.5, lt=1), help="Of the intervals.")
    ] = 0.95,
    seed: Annotated[int, Parameter(validator=Number(gte=0), help="Of halves and controls.")] = 0,
    max_samples: Annotated[
        int | None, Parameter(validator=Number(gte=1), help="The first so many samples only.")
    ] = None,
    pattern: Annotated[
        str | None, Parameter(help="regex_answer: a regular expression with one group.")
    ] = None,
    max_tokens: Annotated[
        int | None, Parameter(validator=Number(gte=1), help="Length of generated texts at most.")
    ] = None,
    write: Annotated[
        bool, Parameter(negative=(), help="Write boundary.json beside each adapter's weights.")
    ] = False,
    report: Annotated[
        Path | None, Parameter(help="Directory for report.md, curve.svg and report.json.")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Find each adapter's best depth from samples, prove it on others, and show the evidence."""
    from boundary.options import CalibrationOptions
    from server.calibrate import calibrate as run
    from server.calibration.generation import GenerationOptions

    try:
        options = CalibrationOptions(
            metric=metric,
            method=method,
            tolerance=tolerance,
            relative=relative,
            confidence=confidence,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return run(
        settings,
        adapters,
        names=name or (),
        data=data or (),
        test=test or (),
        options=options,
        generation=GenerationOptions(pattern=pattern, max_tokens=max_tokens),
        max_samples=max_samples,
        write=write,
        report=report,
        as_json=json,
    )


@app.command
@with_settings(ModelSettings)
def doctor(
    settings: Settings,
    *,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Show what this machine offers: device, dtype, attention, libraries, memory."""
    from server.doctor import doctor as run

    return run(settings, as_json=json)


@app.command
@with_settings(*LOCAL)
def bench(
    settings: Settings, *, options: Annotated[BenchOptions, Parameter(name="*")] = _BENCH_DEFAULTS
) -> int:
    """Time the engine under load, beside transformers' `generate` and PEFT's mixed batch."""
    from server.bench.benchmark import bench as run

    return run(settings, options)


keys = App(name="keys", help="Make, list and revoke the keys of a keys file or a database.")
app.command(keys)

KeysFile = Annotated[
    Path | None, Parameter(help=f"File that keeps them, hashed. [{variable('keys_file')}]")
]
KeysDatabase = Annotated[
    str | None, Parameter(help=f"Database that keeps them, hashed. [{variable('database')}]")
]


def _kept_in(keys_file: Path | None, database: str | None) -> Settings:
    """What is named on the command line; if nothing is, what the environment names."""
    given = {"keys_file": keys_file, "database": database}
    flags = {name: value for name, value in given.items() if value is not None}
    return load_settings(flags, environ={}) if flags else load_settings()


@keys.command(name="add")
def add_key(
    name: Annotated[str, Parameter(help="Who will have it, in one line.")],
    /,
    *,
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
    admin: Annotated[
        bool, Parameter(negative=(), help="A key for /admin and for loading adapters.")
    ] = False,
    adapters: Annotated[
        list[str] | None,
        Parameter(help="A model that it may use, by name or shell pattern; repeatable."),
    ] = None,
    max_depth: Annotated[int | None, Parameter(help="The deepest lora_depth it may use.")] = None,
    requests_per_minute: Annotated[int | None, Parameter(help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[
        int | None, Parameter(help="Tokens a minute, of prompts and answers.")
    ] = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of the key.")] = False,
) -> int:
    """Make a key for NAME and print it, which happens once: only its hash is kept."""
    from server.keys import add

    return add(
        _kept_in(keys_file, database),
        name,
        is_admin=admin,
        adapters=adapters or (),
        limits={
            "max_depth": max_depth,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        },
        as_json=json,
    )


@keys.command(name="list")
def list_keys(
    *,
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
    json: Annotated[bool, Parameter(negative=(), help="Print JSON instead of a table.")] = False,
) -> int:
    """Show the keys, also those that were revoked."""
    from server.keys import show

    return show(_kept_in(keys_file, database), as_json=json)


@keys.command(name="revoke")
def revoke_keys(
    *ids: Annotated[str, Parameter(help="Of the keys, as `list` shows them.")],
    keys_file: KeysFile = None,
    database: KeysDatabase = None,
) -> int:
    """Let keys open nothing any more; a server that runs knows within two seconds."""
    from server.keys import revoke

    if not ids:
        raise ConfigError("name the keys to revoke by their ids")
    return revoke(_kept_in(keys_file, database), ids)


def main(arguments: list[str] | None = None) -> None:
    """The console script. See `command_line.run`."""
    command_line.run(app, arguments, prefix="fathom: ")
