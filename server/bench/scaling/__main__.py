"""`python -m server.bench.scaling CURVE`: one command a curve, each with a table, JSON and a drawing.

The status is 1 where a request failed, an answer was wrong or a bound broken; how fast anything was
is never a failure.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from server import command_line
from server.bench.findings import show
from server.bench.mix import Choice
from server.bench.scaling import loads
from server.bench.scaling.drawing import Panel, draw
from server.bench.scaling.long_context import (
    is_linear,
    long_context_table,
    measure_long_context,
)
from server.bench.scaling.options import Count, Counts, Depths, ScalingOptions
from server.bench.scaling.preemption import measure_preemption, preemption_table
from server.bench.scaling.prefix import (
    WITH,
    WITHOUT,
    PrefixLoad,
    measure_prefix,
    prefix_table,
)
from server.bench.scaling.quantized import measure_quantized
from server.bench.scaling.registered import measure_registered, registered_tables
from server.bench.scaling.report import (
    quantized_lines,
    quantized_table,
    step_lines,
    step_table,
)
from server.bench.scaling.resident import measure_resident, resident_table
from server.bench.scaling.run import facts_of, open_engine, run_curve, scratch, tell
from server.bench.scaling.served import Served
from server.bench.scaling.step import max_len, measure_steps
from server.config import ConfigError
from server.loading import progress_on_stderr
from server.logs import configure_logs

Options = Annotated[ScalingOptions, Parameter(name="*")]
_DEFAULTS = ScalingOptions()
_DOUBLING = (1, 2, 4, 8, 16, 32, 64)

app = App(name="scaling", help="How the engine scales.")


@app.command
def concurrency(*, values: Counts = _DOUBLING, options: Options = _DEFAULTS) -> int:
    """Throughput against requests in flight."""
    return run_curve(loads.concurrency(options, values), options)


@app.command
def adapters(*, values: Counts = _DOUBLING, options: Options = _DEFAULTS) -> int:
    """Throughput against distinct adapters in a batch of equal size."""
    return run_curve(loads.adapters(options, values), options)


@app.command
def depth(*, values: Depths = (), options: Options = _DEFAULTS) -> int:
    """Throughput against depth, and what the saving is made of; without values, every depth."""
    return run_curve(loads.depth(options, values), options, with_explanation=True)


@app.command
def rank(*, values: Counts = (8, 16, 32, 64, 128, 256), options: Options = _DEFAULTS) -> int:
    """Throughput against the adapters' rank."""
    return run_curve(loads.rank(options, values), options)


@app.command
def context(
    *, values: Counts = (64, 128, 256, 512, 1024, 1984), options: Options = _DEFAULTS
) -> int:
    """Throughput against the prompt's length."""
    return run_curve(loads.context(options, values), options)


@app.command
def registered(
    *,
    values: Counts = (100, 1000, 10_000),
    repeat: Count = 3,
    random_model: str = "12x256:vocab=1000",
    rank: Count = 8,
    json: Path | None = None,
) -> int:
    """Start-up, memory and look-ups with so many adapters below a root, or named in a file."""
    configure_logs("warning")
    options = ScalingOptions(random_model=random_model, rank=rank)
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, {"adapter": rank}, directory, progress)
        found = measure_registered(
            served.model, served.adapters["adapter"], values, repeat, directory, progress
        )
    facts = {"model": random_model, "rank": rank, "repeat": repeat}
    show(registered_tables(found), facts, found, json)
    return 0


@app.command
def step(*, values: Counts = (1, 16), options: Options = _DEFAULTS) -> int:
    """A decode step of so many rows beside its own matrix products, and what LoRA adds by depth."""
    configure_logs("warning")
    names = [f"a{index}" for index in range(options.num_adapters)]
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, dict.fromkeys(names, options.rank), directory, progress)
        full = served.shape.num_layers
        settings = served.settings(
            max_len=max_len(max(values), options.prompt_len),
            concurrency=max(values),
            prefix_caching=False,
        )
        found = measure_steps(
            settings,
            values,
            (0, full // 2, full),
            prompt_len=options.prompt_len,
            repeat=options.repeat,
            progress=progress,
        )
    show([step_table(found)], facts_of(options), found, options.json, step_lines(found))
    return 0


@app.command
def quantized(
    *, values: Counts = (1, 16), prefill_len: Count = 512, options: Options = _DEFAULTS
) -> int:
    """Decode steps of so many rows, and a prefill, with int8 weights and without, in turn."""
    configure_logs("warning")
    names = [f"a{index}" for index in range(options.num_adapters)]
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, dict.fromkeys(names, options.rank), directory, progress)
        settings = served.settings(
            max_len=max(max_len(max(values), options.prompt_len), prefill_len + 2),
            concurrency=max(values),
            prefix_caching=False,
        )
        found = measure_quantized(
            settings,
            values,
            prompt_len=options.prompt_len,
            prefill_len=prefill_len,
            repeat=options.repeat,
            progress=progress,
        )
    facts = facts_of(options)
    show([quantized_table(found)], facts, found, options.json, quantized_lines(found))
    return 0


@app.command
def prefix(
    *, system_len: Count = 512, num_requests: Count = 8, options: Options = _DEFAULTS
) -> int:
    """Hits and time to the first token with a shared system prompt, by adapter and depth.

    Parameters
    ----------
    system_len
        Tokens that all requests of a choice begin with; --prompt-len follow.
    num_requests
        Of a choice, after the first one, which finds nothing.
    """
    configure_logs("warning")
    load = PrefixLoad(
        system_len, options.prompt_len, options.output_len, num_requests, options.concurrency
    )
    names = [f"a{index}" for index in range(options.num_adapters)]
    with scratch() as directory, progress_on_stderr() as progress, ExitStack() as stack:
        served = Served(options, dict.fromkeys(names, options.rank), directory, progress)
        depths = sorted({0, served.shape.num_layers // 2, served.shape.num_layers})
        choices = [Choice(name, depth) for name in names for depth in depths]
        # Every first request's blocks stay while a repeat lasts.
        num_sequences = load.concurrency + 2 * len(choices)
        engines = {
            name: open_engine(
                stack,
                served.settings(
                    max_len=load.max_len, concurrency=num_sequences, prefix_caching=name == WITH
                ),
            )
            for name in (WITH, WITHOUT)
        }
        found = measure_prefix(engines, choices, load, options.repeat, options.seed, progress)
    facts = facts_of(options) | {"system_len": system_len, "num_requests": num_requests}
    show([prefix_table(found)], facts, found, options.json)
    return tell([f"{one.choice}: unexpected hits" for one in found if not one.is_as_expected])


@app.command
def preemption(*, values: Counts = (100, 75, 50, 35, 25), options: Options = _DEFAULTS) -> int:
    """Tokens computed again where the cache holds only so many percent of what is in flight."""
    configure_logs("warning")
    plan = loads.concurrency(options, (options.concurrency,))
    (load,) = plan.loads
    with scratch() as directory, progress_on_stderr() as progress, ExitStack() as stack:
        served = Served(options, plan.ranks, directory, progress)
        longest = -(-plan.max_len // served.block_size)
        engines = {
            percent: open_engine(
                stack,
                served.settings(
                    max_len=plan.max_len,
                    concurrency=load.concurrency,
                    kv_cache_bytes=served.cache_bytes(
                        max(longest, longest * load.concurrency * percent // 100)
                    ),
                ),
            )
            for percent in values
        }
        found = measure_preemption(
            engines, load.workload, load.concurrency, options.repeat, progress
        )
    show([preemption_table(found)], facts_of(options), found, options.json)
    broken = [f"{one.percent} %: over the bound" for one in found if not one.is_within]
    return tell([*(error for one in found for error in one.errors), *broken])


@app.command
def long_context(
    *,
    values: Counts = (2048, 4096, 8192, 16_384, 32_768),
    random_model: str = "4x256:heads=4:vocab=1000:positions=33000",
    rank: Count = 8,
    max_num_batched_tokens: Count = 512,
    json: Path | None = None,
) -> int:
    """What one long prompt holds at once, which must not grow faster than its length."""
    configure_logs("warning")
    options = ScalingOptions(random_model=random_model, rank=rank)
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, {"a0": rank}, directory, progress)
        settings = served.settings(
            max_len=max(values) + max_num_batched_tokens,
            concurrency=1,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        found = measure_long_context(settings, values, "a0", progress)
    facts = {"model": random_model, "rank": rank, "chunk": max_num_batched_tokens}
    show([long_context_table(found)], facts, found, json)
    return tell([] if is_linear(found) else ["the peak grows faster than the prompt"])


@app.command
def resident(
    *, values: Counts | None = None, budget_slots: Count = 8, options: Options = _DEFAULTS
) -> int:
    """How many adapters fit the device, kept below each depth; without values, quarters of the model.

    Parameters
    ----------
    values
        Depths of at least 1.
    budget_slots
        The room, in adapters that are kept whole.
    """
    configure_logs("warning")
    with scratch() as directory, progress_on_stderr() as progress:
        served = Served(options, {"a0": options.rank}, directory, progress)
        full = served.shape.num_layers
        depths = values or sorted({-(-full * quarter // 4) for quarter in range(1, 5)})
        if max(depths) > full:
            raise ConfigError(f"--values: a depth is at most {full} (given {max(depths)})")
        settings = served.settings(max_len=2, concurrency=1)
        found = measure_resident(settings, depths, budget_slots, options.repeat, progress)
    facts = {name: getattr(options, name) for name in ("random_model", "device", "dtype", "rank")}
    show([resident_table(found, budget_slots)], facts, found, options.json)
    return 0


@app.command
def picture(*reports: Path, svg: Path, title: str = "") -> int:
    """Curves beside each other, from the reports that their commands wrote with --json."""
    try:
        panels = [Panel.read(report) for report in reports]
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if not panels:
        raise ConfigError("no report is named")
    draw(panels, title=title, path=svg)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Run one command. See `command_line.run`."""
    command_line.run(app, arguments)


if __name__ == "__main__":
    main()
