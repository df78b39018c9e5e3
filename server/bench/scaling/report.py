"""Findings as tables."""

from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from server.bench.measure import Spread
from server.bench.scaling.curve import Curve
from server.bench.scaling.explanation import Explanation
from server.bench.scaling.quantized import KINDS, QuantizedFindings
from server.bench.scaling.step import StepTimes


def curve_table(curve: Curve) -> Table:
    """One row a point."""
    table = Table(caption="median of the runs (least to most)")
    titles = (curve.quantity, "output tokens/s", "of the first", "first token, ms", "steps")
    for title in titles:
        table.add_column(title, justify="right")
    first = curve.points[0].tokens_per_s.median
    for point in curve.points:
        table.add_row(
            str(point.x),
            spread(point.tokens_per_s),
            f"{point.tokens_per_s.median / first:.2f}",
            f"{1000 * point.first_token_s.median:.0f}",
            str(point.runs[0].num_steps),
        )
    return table


def explanation_table(found: Explanation) -> Table:
    """One row a depth: what was counted, what it must take at least, what it took."""
    table = Table(caption="saved: against the last row, per step")
    for title in (
        "depth", "step, ms", "launches", "LoRA bytes", "saved, ms", "explained, ms",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for step in found.steps:
        table.add_row(
            str(step.depth),
            spread(step.seconds, 1000),
            str(step.num_launches),
            decimal(step.lora_bytes),
            f"{1000 * found.saved_s(step):.2f}",
            f"{1000 * found.explained_s(step):.2f}",
        )
    return table


def explanation_lines(found: Explanation) -> list[str]:
    """The same a layer, and the machine's limits."""
    first, last, machine = found.steps[0], found.steps[-1], found.machine
    num_layers = last.depth - first.depth
    return [
        f"a decode step of {found.num_rows} rows over {found.num_adapters} adapters; this machine"
        f" reads {decimal(int(machine.bytes_per_s))}/s, multiplies at"
        f" {machine.flops_per_s / 1e9:.0f} GFLOP/s, and a launch takes"
        f" {1e6 * machine.launch_s:.2f} us",
        f"a layer's LoRA: {decimal((last.lora_bytes - first.lora_bytes) // num_layers)},"
        f" {(last.lora_flops - first.lora_flops) / num_layers / 1e6:.1f} MFLOP,"
        f" {(last.num_launches - first.num_launches) / num_layers:.1f} launches; saved"
        f" {1e6 * found.saved_s(first) / num_layers:.0f} us, explained"
        f" {1e6 * found.explained_s(first) / num_layers:.0f} us",
    ]


def step_table(found: Sequence[StepTimes]) -> Table:
    """One row a number of rows; milliseconds."""
    table = Table(caption="a decode step; median of the repeats (least to most)")
    titles = ["rows", "linears, ms", "attention's products, ms", "step, ms", "step / products"]
    depths = list(found[0].at_depth)
    for title in (*titles, *(f"LoRA tax at depth {depth}, %" for depth in depths)):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.num_rows),
            *(spread(part, 1000) for part in (one.linears, one.attention, one.base)),
            spread(one.over_products),
            *(spread(one.tax(depth), 100) for depth in depths),
        )
    return table


def step_lines(found: Sequence[StepTimes]) -> list[str]:
    """How the numbers are meant."""
    return [
        f"products: those of one step with nothing between them, at {found[0].context_len} tokens of context;"
        " step: the engine's whole step, sampling and text included; tax: the share of the base"
        " model's steps per second that LoRA costs"
    ]


def quantized_table(found: QuantizedFindings) -> Table:
    """One row a kind of step; milliseconds."""
    table = Table(caption="median of the repeats (least to most)")
    for title in ("step", "without, ms", "int8, ms", "times as fast"):
        table.add_column(title, justify="left" if title == "step" else "right")
    for one in found.times:
        times = (spread(one.seconds[kind], 1000) for kind in KINDS)
        table.add_row(one.what, *times, spread(one.speed))
    return table


def quantized_lines(found: QuantizedFindings) -> list[str]:
    """What the weights take."""
    plain, quantized = (found.base_bytes[kind] for kind in KINDS)
    return [f"base weights: {decimal(plain)}, and {decimal(quantized)} with int8"]


def spread(found: Spread, factor: float = 1.0) -> str:
    """`12.3 (11.9 to 12.8)`"""
    values = [value * factor for value in (found.median, found.min, found.max)]
    digits = 2 if max(values) < 10 else 1 if max(values) < 100 else 0
    middle, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({least} to {most})"
