"""`python -m server.bench.calibration cost | memory | latency`: the commands and their flags.

Each prints a table and, with `--json`, writes all of it. The status is 1 where scores differ, the
bound is broken, a job does not end or a request fails; how fast anything was is never a failure.
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from server import command_line
from server.bench.calibration.cost import TOLERANCE, measure_cost
from server.bench.calibration.latency import measure_latency
from server.bench.calibration.memory import measure_memory
from server.bench.calibration.report import cost_table, job_lines, latency_table, memory_table
from server.bench.calibration.served import JobOptions, serving
from server.bench.calibration.sides import adapted, random_samples, save, three_sides
from server.bench.findings import show
from server.bench.options import BenchOptions
from server.bench.shape import parse_shape
from server.config import Settings
from server.loading import progress_on_stderr
from server.logs import configure_logs

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Seed = Annotated[int, Parameter(validator=Number(gte=0))]
Shapes = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
Counts = Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())]

app = App(name="calibration", help="What calibration costs.")


@app.command
def cost(
    *,
    shapes: Shapes = ("12x512:vocab=1000", "16x512:vocab=1000", "24x512:vocab=1000"),
    rank: Count = 16,
    num_samples: Count = 4,
    prompt_len: Count = 128,
    completion_len: Count = 32,
    repeat: Count = 5,
    seed: Seed = 0,
    json: Path | None = None,
) -> int:
    """Time a sweep beside one forward pass a depth, once both have scored alike.

    Parameters
    ----------
    shapes
        Random Llamas as of `fathom bench --random-model`. Their vocabulary is small, because the
        reference makes logits of every position and the sweep does not.
    rank
        Of the adapter, on every linear module of every layer.
    num_samples
        Samples to score.
    prompt_len
        Prompt tokens of each.
    completion_len
        Completion tokens of each.
    repeat
        How often each side is timed.
    seed
        Of weights and samples.
    json
        Write everything to this file.
    """
    configure_logs("warning")
    found = {}
    for text in shapes:
        shape = parse_shape(text)
        samples = random_samples(num_samples, prompt_len, completion_len, shape.vocab_size, seed)
        with (
            tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory,
            three_sides(shape, samples, Path(directory), rank=rank, seed=seed) as sides,
        ):
            found[text] = measure_cost(sides, samples, shape.num_layers, repeat)
    show([cost_table(found)], {"rank": rank, "repeat": repeat, "seed": seed}, found, json)
    if all(one.is_equal for one in found.values()):
        return 0
    sys.stderr.write(f"scores differ from the reference's by more than {TOLERANCE}\n")
    return 1


@app.command
def memory(
    *,
    shape: str = "12x512:vocab=1000",
    rank: Count = 16,
    num_samples: Count = 16,
    prompt_len: Count = 128,
    completion_len: Count = 32,
    max_tokens: Counts = (512, 2048, 8192),
    seed: Seed = 0,
    json: Path | None = None,
) -> int:
    """Count what a sweep holds at once, beside the bound that it states.

    Parameters
    ----------
    shape
        A random Llama as of `fathom bench --random-model`.
    rank
        Of the adapter, on every linear module of every layer.
    num_samples
        Samples to score.
    prompt_len
        Prompt tokens of each.
    completion_len
        Completion tokens of each.
    max_tokens
        Tokens that one slice may run through a layer.
    seed
        Of weights and samples.
    json
        Write everything to this file.
    """
    configure_logs("warning")
    parsed = parse_shape(shape)
    samples = random_samples(num_samples, prompt_len, completion_len, parsed.vocab_size, seed)
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory:
        model = adapted(*save(parsed, Path(directory), rank=rank, seed=seed))
        found = [measure_memory(model, parsed, samples, limit) for limit in max_tokens]
    facts = {
        "model": shape,
        "rank": rank,
        "samples": f"{num_samples} x {prompt_len + completion_len} tokens",
        "seed": seed,
    }
    show([memory_table(found)], facts, found, json)
    return int(not all(one.is_within for one in found))


@app.command
def latency(
    *,
    random_model: str | None = None,
    num_adapters: Count = 4,
    rank: Count = 16,
    adapter: str | None = None,
    streams: Count = 8,
    prompt_len: str = "32-96",
    output_len: str = "32-96",
    num_samples: Count = 32,
    sample_prompt_len: Count = 32,
    sample_completion_len: Count = 16,
    share: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 0.1,
    max_num_batched_tokens: Count = 512,
    repeat: Count = 2,
    limit_s: Annotated[float, Parameter(validator=Number(gt=0))] = 3600.0,
    seed: Seed = 0,
    json: Path | None = None,
) -> int:
    """Time the tokens of streams that never pause, with and without a calibration beside them.

    Parameters
    ----------
    random_model
        A random Llama as of `fathom bench --random-model`; without one, the embedded demo.
    num_adapters
        Of a random model. The streams take all adapters in equal shares, at full depth.
    rank
        Of those.
    adapter
        The one that is calibrated; without one, the first.
    streams
        How many run at once.
    prompt_len
        Prompt tokens of the streams: 64, or 16-128.
    output_len
        Tokens that each generates: 64, or 16-128.
    num_samples
        Samples of the calibration: of the demo the adapter's own, of a random model random ones.
    sample_prompt_len
        Prompt tokens of a random sample.
    sample_completion_len
        Completion tokens of a random sample.
    share
        As `fathom serve --calibration-share`.
    max_num_batched_tokens
        As of `fathom serve`; also how many tokens a slice may run through a layer.
    repeat
        Calibrations beside the streams, one after the other.
    limit_s
        Seconds after which a job is given up, quiet turns included.
    seed
        Of weights, prompts, lengths, samples and the calibration.
    json
        Write everything to this file.
    """
    configure_logs("warning")
    settings = Settings.model_validate(
        {
            "calibration_share": share,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_lora_rank": max(rank, Settings.model_fields["max_lora_rank"].default),
        }
    )
    load = BenchOptions(
        random_model=random_model,
        num_adapters=num_adapters if random_model else 0,
        rank=rank,
        concurrency=streams,
        num_requests=8 * streams,  # then lengths begin again
        prompt_len=prompt_len,
        output_len=output_len,
        seed=seed,
    )
    job_options = JobOptions(
        adapter, num_samples, sample_prompt_len, sample_completion_len, limit_s, seed
    )
    with (
        tempfile.TemporaryDirectory(prefix="fathom-bench-") as directory,
        serving(settings, load, job_options, Path(directory)) as (engine, plan, job),
    ):
        with progress_on_stderr() as progress:
            found = asyncio.run(
                measure_latency(
                    engine, plan.workload, job,
                    num_streams=streams, repeat=repeat, progress=progress,
                )
            )  # fmt: skip
        facts = {
            **{name: plan.facts[name] for name in ("prompt", "completion", "mix", "seed")},
            "streams": streams,
            "model": plan.served.base,
            "calibrated": job.adapter,
            "samples": len(job.dataset.samples),
            "share": share,
            "slice": f"{max_num_batched_tokens} tokens",
        }
    show([latency_table(found)], facts, found, json, job_lines(found))
    for error in found.errors:
        sys.stderr.write(f"error: {error}\n")
    return int(bool(found.errors) or not found.is_finished)


def main(arguments: list[str] | None = None) -> None:
    """Run one command. See `command_line.run`."""
    command_line.run(app, arguments)


if __name__ == "__main__":
    main()
