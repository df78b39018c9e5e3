"""Arrivals and lengths from a recorded trace: Azure's LLM inference CSVs and files like them.

The rule that fits a trace to a model: both lengths of every row are multiplied by one factor (the
largest, at most 1, at which the longest row fits, unless one is given) and rounded down to at least 1;
a row that is still too long is clipped, its completion to half of the limit and then its prompt to
what is left. The report counts the rows that were clipped.
"""

import csv
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from server.config import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of the trace; `arrival_s` counts from the first."""

    arrival_s: float
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class FittedTrace:
    """Rows that fit a model, and what was done to them."""

    rows: tuple[TraceRow, ...]
    scale: float
    num_clipped: int


def read_trace(path: Path, max_rows: int) -> list[TraceRow]:
    """The first `max_rows` rows, in order of arrival. Raises ConfigError that names the line."""
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"--trace: {path} has no column {', '.join(missing)}")
            for record in islice(reader, max_rows):
                rows.append(_parse_row(record, f"{path}:{reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--trace: {path} cannot be read: {error}") from None
    if len(rows) < max_rows:
        raise ConfigError(
            f"--trace: {path} has {len(rows)} rows, --num-requests asks for {max_rows}"
        )
    rows.sort(key=lambda row: row.arrival_s)
    first_s = rows[0].arrival_s
    return [TraceRow(row.arrival_s - first_s, row.prompt_len, row.output_len) for row in rows]


def fit_trace(rows: list[TraceRow], max_len: int, scale: float | None) -> FittedTrace:
    """Scale and clip to prompts and completions of together at most `max_len` tokens, `max_len >= 2`."""
    if scale is None:
        longest = max(row.prompt_len + row.output_len for row in rows)
        scale = min(1.0, max_len / longest)
    fitted, num_clipped = [], 0
    for row in rows:
        prompt_len = max(1, math.floor(row.prompt_len * scale))
        output_len = max(1, math.floor(row.output_len * scale))
        if prompt_len + output_len > max_len:
            num_clipped += 1
            output_len = min(output_len, max_len // 2)
            prompt_len = min(prompt_len, max_len - output_len)
        fitted.append(TraceRow(row.arrival_s, prompt_len, output_len))
    return FittedTrace(tuple(fitted), scale, num_clipped)


def at_rate(rows: tuple[TraceRow, ...], rate: float) -> tuple[TraceRow, ...]:
    """The same pattern of arrivals, stretched to a mean of `rate` requests a second."""
    if len(rows) < 2 or rows[-1].arrival_s == 0:
        return rows
    factor = (len(rows) - 1) / rate / rows[-1].arrival_s
    return tuple(TraceRow(r.arrival_s * factor, r.prompt_len, r.output_len) for r in rows)


def _parse_row(record: dict[str, str], where: str) -> TraceRow:
    try:
        arrived = datetime.fromisoformat(record["TIMESTAMP"])
        arrival_s = (arrived if arrived.tzinfo else arrived.replace(tzinfo=UTC)).timestamp()
        lengths = int(record["ContextTokens"]), int(record["GeneratedTokens"])
    except (ValueError, TypeError):
        raise ConfigError(f"--trace: {where}: should be a time and two numbers") from None
    if min(lengths) < 0:
        raise ConfigError(f"--trace: {where}: lengths should not be negative")
    return TraceRow(arrival_s, *lengths)
