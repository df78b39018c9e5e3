"""Azure's trace format, what is refused of it, and the rule that fits it to a model."""

from pathlib import Path

import pytest

from server.bench.trace import TraceRow, at_rate, fit_trace, read_trace
from server.config import ConfigError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(directory: Path, text: str) -> Path:
    path = directory / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_arrivals_count_from_the_first(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER
        + "2023-11-16 18:17:04.9799600,374,44\n"
        + "2023-11-16 18:17:03.9799600,396,109\n"
        + "2023-11-16 18:17:06.4799600,1,1\n",
    )
    assert read_trace(path, 2) == [TraceRow(0.0, 396, 109), TraceRow(1.0, 374, 44)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,1\n", "no column GeneratedTokens"),
        ("", "no column TIMESTAMP"),
        (HEADER + "2023-11-16 18:17:03,1,x\n", "trace.csv:2"),
        (HEADER + "yesterday,1,2\n", "trace.csv:2"),
        (HEADER + "2023-11-16 18:17:03,1\n", "trace.csv:2"),
        (HEADER + "2023-11-16 18:17:03,-1,2\n", "negative"),
        (HEADER, "has 0 rows"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--trace") as refused:
        read_trace(write(tmp_path, text), 1)
    assert message in str(refused.value)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", 1)


ROWS = [TraceRow(0.0, 900, 100), TraceRow(1.0, 90, 10), TraceRow(4.0, 1, 0)]


def test_one_factor_makes_the_longest_row_fit() -> None:
    fitted = fit_trace(ROWS, 100, None)
    assert fitted.scale == 0.1
    assert fitted.rows == (TraceRow(0.0, 90, 10), TraceRow(1.0, 9, 1), TraceRow(4.0, 1, 1))
    assert fitted.num_clipped == 0


@pytest.mark.parametrize("max_len", range(20, 140, 7))
def test_the_default_factor_clips_nothing(max_len: int) -> None:
    rows = [TraceRow(0.0, 1374, 109), TraceRow(1.0, 879, 55)]
    fitted = fit_trace(rows, max_len, None)
    assert fitted.num_clipped == 0
    longest = fitted.rows[0]
    assert max_len - 2 <= longest.prompt_len + longest.output_len <= max_len


def test_a_trace_that_fits_stays_as_it_is() -> None:
    assert fit_trace(ROWS[:2], 1000, None).rows == tuple(ROWS[:2])


def test_a_given_factor_clips_what_is_too_long() -> None:
    fitted = fit_trace(ROWS, 100, 1.0)
    assert fitted.rows == (TraceRow(0.0, 50, 50), TraceRow(1.0, 90, 10), TraceRow(4.0, 1, 1))
    assert fitted.num_clipped == 1


@pytest.mark.parametrize("max_len", [2, 3, 17, 100])
def test_every_row_fits_after_it_was_fitted(max_len: int) -> None:
    for scale in (None, 0.01, 1.0, 5.0):
        for row in fit_trace(ROWS, max_len, scale).rows:
            assert row.prompt_len >= 1
            assert row.output_len >= 1
            assert row.prompt_len + row.output_len <= max_len


def test_a_rate_stretches_the_pattern() -> None:
    stretched = at_rate(tuple(ROWS), 0.5)
    assert [row.arrival_s for row in stretched] == [0.0, 1.0, 4.0]
    assert [row.arrival_s for row in at_rate(tuple(ROWS), 2.0)] == [0.0, 0.25, 1.0]
    assert at_rate(tuple(ROWS[:1]), 2.0) == tuple(ROWS[:1])
