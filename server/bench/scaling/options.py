"""What every curve can be asked: the model, its load, how often, and where the findings go.

Plain values as they were typed. Loads no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.validators import Number

_WHAT = Group("What is served", sort_key=1)
_LOAD = Group("The load", sort_key=2)
_METHOD = Group("How it is measured", sort_key=3)

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Counts = Annotated[tuple[Count, ...], Parameter(consume_multiple=True, negative=())]
Depths = Annotated[
    tuple[Annotated[int, Parameter(validator=Number(gte=0))], ...],
    Parameter(consume_multiple=True, negative=()),
]


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """One curve."""

    random_model: Annotated[
        str, Parameter(group=_WHAT, help="A random Llama as of `fathom bench --random-model`.")
    ] = "12x768:intermediate=2048:heads=12:vocab=8000"
    device: Annotated[str, Parameter(group=_WHAT, help="cpu or cuda.")] = "cpu"
    dtype: Annotated[str, Parameter(group=_WHAT, help="As of `fathom serve`.")] = "float32"
    rank: Annotated[Count, Parameter(group=_WHAT, help="Of the adapters, on every Linear.")] = 16
    num_adapters: Annotated[
        Count,
        Parameter(group=_WHAT, help="Distinct ones in the batch, where that is not the curve."),
    ] = 4

    concurrency: Annotated[
        Count, Parameter(group=_LOAD, help="Requests in flight, where that is not the curve.")
    ] = 16
    rounds: Annotated[
        Count, Parameter(group=_LOAD, help="Requests of a run: so many times the concurrency.")
    ] = 2
    prompt_len: Annotated[
        Count, Parameter(group=_LOAD, help="Prompt tokens, where that is not the curve.")
    ] = 64
    output_len: Annotated[Count, Parameter(group=_LOAD, help="Tokens of a completion.")] = 64
    seed: Annotated[
        int,
        Parameter(
            group=_LOAD, validator=Number(gte=0), help="Of weights, prompts and which asks whom."
        ),
    ] = 0

    repeat: Annotated[
        Count, Parameter(group=_METHOD, help="Runs of each point; the points take turns.")
    ] = 5
    json: Annotated[
        Path | None, Parameter(group=_METHOD, help="Write everything to this file.")
    ] = None
    svg: Annotated[Path | None, Parameter(group=_METHOD, help="Draw the curve to this file.")] = (
        None
    )
