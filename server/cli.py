"""The `fathom` command line. Every setting is a flag; commands live in modules of their own names.

Those modules load torch, so each is imported when its command runs: `fathom --help` stays quick.
"""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

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
)
from server.keys_cli import keys
from server.model import waiting_compiler
from server.setting_flags import with_settings

app = App(
    name="fathom",
    version=__version__,
    help="Serve one base language model with many LoRA adapters, each request at its own depth.",
    default_parameter=Parameter(negative_iterable=()),
)

LOCAL = (ModelSettings, AdapterSettings, EngineSettings)
SERVER = (*LOCAL, StoreSettings, HttpSettings)
_BENCH_DEFAULTS = BenchOptions()


@app.command
@with_settings(*SERVER)
def serve(settings: Settings) -> int:
    """Serve MODEL and its adapters to OpenAI clients, on the loopback address unless told else."""
    waiting_compiler.wait()
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
    waiting_compiler.wait()
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


app.command(keys)


def main(arguments: list[str] | None = None) -> None:
    """The console script. See `command_line.run`."""
    command_line.run(app, arguments, prefix="fathom: ")
