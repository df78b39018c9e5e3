"""The five curves of throughput: which quantity they follow, over which adapters, with which loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.bench.mix import Choice, Mix
from server.bench.scaling.curve import Load
from server.bench.scaling.options import ScalingOptions
from server.bench.shape import parse_shape
from server.bench.workload import Lengths, draw_rows, make_workload
from server.config import ConfigError


@dataclass(frozen=True, slots=True)
class CurvePlan:
    """What is served and asked. ranks: of each adapter by name. max_len: of the longest request."""

    quantity: str
    ranks: Mapping[str, int]
    loads: Sequence[Load]
    max_len: int

    @property
    def max_concurrency(self) -> int:
        """Of any load."""
        return max(load.concurrency for load in self.loads)


def concurrency(options: ScalingOptions, values: Sequence[int]) -> CurvePlan:
    """Requests in flight, over all adapters at full depth."""
    names = _names(options.num_adapters)
    loads = [_load(options, x, _mix(names), concurrency=x) for x in values]
    return _plan("requests in flight", options, dict.fromkeys(names, options.rank), loads)


def adapters(options: ScalingOptions, values: Sequence[int]) -> CurvePlan:
    """Distinct adapters in a batch that is always as large as the largest number of them."""
    names = _names(max(values))
    width = max(options.concurrency, *values)
    loads = [_load(options, x, _mix(names[:x]), concurrency=width) for x in values]
    return _plan(
        "distinct adapters in the batch", options, dict.fromkeys(names, options.rank), loads
    )


def depth(options: ScalingOptions, values: Sequence[int]) -> CurvePlan:
    """The depth of every request; without values, every depth that the model has."""
    num_layers = parse_shape(options.random_model).num_layers
    if max(values, default=0) > num_layers:
        raise ConfigError(f"--values: a depth is at most {num_layers} (given {max(values)})")
    names = _names(options.num_adapters)
    loads = [_load(options, x, _mix(names, x)) for x in values or range(num_layers + 1)]
    return _plan("depth", options, dict.fromkeys(names, options.rank), loads)


def rank(options: ScalingOptions, values: Sequence[int]) -> CurvePlan:
    """The rank of all adapters in the batch."""
    names = {x: [f"r{x}-{name}" for name in _names(options.num_adapters)] for x in values}
    loads = [_load(options, x, _mix(names[x])) for x in values]
    ranks = {name: x for x, own in names.items() for name in own}
    return _plan("rank", options, ranks, loads)


def context(options: ScalingOptions, values: Sequence[int]) -> CurvePlan:
    """The prompt's length; a completion is as long at every point."""
    longest = parse_shape(options.random_model).max_position
    if max(values) + options.output_len > longest:
        raise ConfigError(
            f"--values: a prompt and --output-len are at most {longest} tokens together; give the"
            " model more :positions="
        )
    names = _names(options.num_adapters)
    loads = [_load(options, x, _mix(names), prompt_len=x) for x in values]
    return _plan("prompt tokens", options, dict.fromkeys(names, options.rank), loads)


def _names(number: int) -> list[str]:
    return [f"a{index}" for index in range(number)]


def _mix(names: Sequence[str], depth: int | None = None) -> Mix:
    return tuple((Choice(name, depth), 1.0) for name in names)


def _load(
    options: ScalingOptions,
    x: int,
    mix: Mix,
    *,
    concurrency: int | None = None,
    prompt_len: int | None = None,
) -> Load:
    in_flight = concurrency or options.concurrency
    prompt = prompt_len or options.prompt_len
    rows = draw_rows(
        Lengths(prompt, prompt),
        Lengths(options.output_len, options.output_len),
        options.rounds * in_flight,
        None,
        options.seed,
    )
    vocab_size = parse_shape(options.random_model).vocab_size
    return Load(x, make_workload(rows, mix, vocab_size, options.seed), in_flight)


def _plan(
    quantity: str, options: ScalingOptions, ranks: Mapping[str, int], loads: Sequence[Load]
) -> CurvePlan:
    max_len = max(load.workload.max_len for load in loads)
    longest = parse_shape(options.random_model).max_position
    if max_len > longest:
        raise ConfigError(f"{max_len} tokens of a request are over the model's {longest}")
    return CurvePlan(quantity, ranks, loads, max_len)
