"""What a benchmark can be asked: the flags of `fathom bench` beside those of every local command.

Plain values as they were typed; the modules that use them parse them and name the flag at fault.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

_WHAT = Group("What is served", sort_key=10)
_LOAD = Group("The load", sort_key=11)
_METHOD = Group("How it is measured", sort_key=12)

_AT_LEAST_1 = Number(gte=1)
_AT_LEAST_0 = Number(gte=0)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """One benchmark."""

    random_model: Annotated[
        str | None,
        Parameter(
            group=_WHAT,
            help="Instead of MODEL: a random Llama, LAYERSxHIDDEN or a named shape"
            " (llama-3.1-8b, llama-3.2-1b), then :key=value for other dimensions.",
        ),
    ] = None
    num_adapters: Annotated[
        int, Parameter(group=_WHAT, validator=_AT_LEAST_0, help="Random adapters a0, a1, ...")
    ] = 0
    rank: Annotated[
        int, Parameter(group=_WHAT, validator=_AT_LEAST_1, help="Their rank, on every Linear.")
    ] = 16
    url: Annotated[
        str | None,
        Parameter(group=_WHAT, help="A running server instead of an engine of this command's own."),
    ] = None
    http: Annotated[
        bool,
        Parameter(
            group=_WHAT, negative=(), help="Start a server process and drive it over loopback HTTP."
        ),
    ] = False
    vocab_size: Annotated[
        int | None,
        Parameter(
            group=_WHAT,
            validator=_AT_LEAST_1,
            help="With --url: prompts of token ids below this; default 1000.",
        ),
    ] = None

    concurrency: Annotated[
        int,
        Parameter(
            group=_LOAD,
            validator=_AT_LEAST_1,
            help="Requests in flight (closed loop); also the baselines' batch size.",
        ),
    ] = 16
    rate: Annotated[
        float | None,
        Parameter(
            group=_LOAD,
            validator=Number(gt=0),
            help="Open loop: requests a second, Poisson; with --trace its mean rate.",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        Parameter(
            group=_LOAD,
            help="Open loop from a CSV of TIMESTAMP,ContextTokens,GeneratedTokens (Azure's LLM traces).",
        ),
    ] = None
    trace_scale: Annotated[
        float | None,
        Parameter(
            group=_LOAD,
            validator=Number(gt=0),
            help="Factor on the trace's lengths; default: the largest, at most 1, at which all fit.",
        ),
    ] = None
    num_requests: Annotated[
        int, Parameter(group=_LOAD, validator=_AT_LEAST_1, help="Requests of one run.")
    ] = 64
    prompt_len: Annotated[
        str, Parameter(group=_LOAD, help="Prompt tokens: 64, or 16-128 (uniform).")
    ] = "64"
    output_len: Annotated[
        str, Parameter(group=_LOAD, help="Completion tokens: 64, or 16-128 (uniform).")
    ] = "64"
    mix: Annotated[
        str | None,
        Parameter(
            group=_LOAD,
            help="Shares of the requests: base=1,NAME@4=1,NAME@full=2. Default: all adapters at"
            " full depth, or the base model where there are none.",
        ),
    ] = None
    mix_adapters: Annotated[
        int | None,
        Parameter(
            group=_LOAD, validator=_AT_LEAST_1, help="The first N adapters at each of --depths."
        ),
    ] = None
    depths: Annotated[
        str, Parameter(group=_LOAD, help="Depths for --mix-adapters, such as full,6.")
    ] = "full"
    seed: Annotated[
        int,
        Parameter(
            group=_LOAD, validator=_AT_LEAST_0, help="Of prompts, lengths, arrivals, weights."
        ),
    ] = 0

    warmup: Annotated[
        int | None,
        Parameter(
            group=_METHOD,
            validator=_AT_LEAST_0,
            help="Requests before the first run of each side; default: the concurrency.",
        ),
    ] = None
    repeat: Annotated[
        int, Parameter(group=_METHOD, validator=_AT_LEAST_1, help="Runs of each side.")
    ] = 3
    interleave: Annotated[
        bool,
        Parameter(
            group=_METHOD,
            negative="--no-interleave",
            help="Take the sides in turn, so that a noisy minute hits all of them.",
        ),
    ] = True
    baselines: Annotated[
        str | None,
        Parameter(
            group=_METHOD,
            help="generate (base model, static batches), peft (mixed batches), or both with a comma.",
        ),
    ] = None
    baseline_cache: Annotated[
        Literal["dynamic", "static"],
        Parameter(group=_METHOD, help="KV cache of the baselines; static compiles on a GPU."),
    ] = "dynamic"
    check: Annotated[
        bool,
        Parameter(
            group=_METHOD,
            negative=(),
            help="Before timing, compare the engine's greedy tokens and logits with PEFT's.",
        ),
    ] = False
    memory: Annotated[
        bool,
        Parameter(
            group=_METHOD,
            negative="--no-memory",
            help="Run the load once more with the engine alone in a process, for its peak memory.",
        ),
    ] = True
    json: Annotated[
        Path | None, Parameter(group=_METHOD, help="Write the whole report to this file.")
    ] = None
