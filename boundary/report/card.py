"""The section of an adapter's model card that says how deep the adapter has to reach, and why.

Made of the record alone, so that it says what `boundary.json` beside it says. It stands between two
comments that no reader sees, by which it is found again: all else in `README.md` stays as it is.
"""

import os
import re
from pathlib import Path

from boundary import whole_file
from boundary.intervals import Interval
from boundary.record import FILE_NAME, BoundaryRecord, Difference
from boundary.report.page import markdown_table
from boundary.report.quoting import code_span
from boundary.report.report import interval_text, number

CARD_NAME = "README.md"
BEGIN, END = "<!-- boundary: begin -->", "<!-- boundary: end -->"


class CardError(ValueError):
    """A model card in which there is no place for the section, and why."""


def update_card(record: BoundaryRecord, directory: str | os.PathLike[str]) -> Path:
    """Write the section into the adapter's `README.md`, in place of an earlier one, and return its path.

    A file that has none yet gets it at its end; where there is no file, it is the file. The same
    record leaves the same bytes. Raises CardError for a file that is no UTF-8 or has other than one
    beginning and one end after it, and OSError where it cannot be written; then it is as it was.
    """
    path = Path(directory) / CARD_NAME
    try:
        before = path.read_bytes().decode("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise CardError(f"{CARD_NAME} is no UTF-8: byte {error.start}") from None
    section = f"{BEGIN}\n{card_section(record)}{END}"
    whole_file.write({path: _with_section(before, section).encode()})
    return path


def card_section(record: BoundaryRecord) -> str:
    """The section as Markdown, without the comments around it."""
    parts = ["## How deep this adapter reaches", _conclusion(record), *_use(record)]
    if record.curve is not None:
        parts += list(_curve(record))
    parts += ["### What this rests on", markdown_table(["", ""], _facts(record))]
    return "\n\n".join(parts) + "\n"


def _with_section(before: str, section: str) -> str:
    """`section` in place of the one there is, or at the end; marks count as lines of their own alone."""
    newline = "\r\n" if "\r\n" in before else "\n"
    section = section.replace("\n", newline)
    begins, ends = (
        [found.start() for found in re.finditer(rf"^{re.escape(mark)}\r?$", before, re.MULTILINE)]
        for mark in (BEGIN, END)
    )
    if not begins and not ends:
        gap = "" if not before else newline if before.endswith("\n") else 2 * newline
        return f"{before}{gap}{section}{newline}"
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise CardError(
            f"{CARD_NAME} has {len(begins)} lines {BEGIN!r} and {len(ends)} lines {END!r}: it must"
            " have one of each, in this order, or none"
        )
    return before[: begins[0]] + section + before[ends[0] + len(END) :]


def _conclusion(record: BoundaryRecord) -> str:
    depth = f"depth {record.depth} of {record.num_layers}"
    if record.verdict is None:
        assert record.reason is not None  # a pin has one
        return f"Set by hand to {depth}: {code_span(record.reason)}"
    assert record.confirmation is not None
    assert record.confidence is not None
    difference = interval_text(_interval(record.confirmation), record.confidence)
    if record.verdict == "improves":
        return (
            f"**Calibrated depth: {record.depth} of {record.num_layers} layers.** With LoRA in the"
            f" layers below it alone, the adapter scores higher than with all of it: {difference} on"
            " samples that took no part in choosing the depth."
        )
    if record.verdict == "equal_cheaper":
        assert record.tolerance is not None
        return (
            f"**Calibrated depth: {record.depth} of {record.num_layers} layers.** With LoRA in the"
            " layers below it alone, the adapter loses less than the tolerance of"
            f" {number(record.tolerance)} against all of it, and costs less: {difference} on samples"
            " that took no part in choosing the depth."
        )
    return f"**Use the whole adapter ({depth}).** No smaller depth was confirmed to be as good."


def _use(record: BoundaryRecord) -> tuple[str, ...]:
    return (
        f"`{FILE_NAME}` beside the weights says so to Fathom, which serves the adapter at this depth"
        " unless a request asks for another (`lora_depth`). With PEFT alone:",
        "```python\n"
        "import boundary\n"
        "\n"
        f"with boundary.lora_depth(model, {record.depth}):  # a PeftModel with this adapter\n"
        "    model.generate(**inputs)\n"
        "```",
    )


def _curve(record: BoundaryRecord) -> tuple[str, str, str]:
    assert record.curve is not None
    assert record.confidence is not None
    rows = [
        [
            f"**{depth}**" if depth == record.depth else str(depth),
            number(point.score),
            *(
                number(value, signed=True)
                for value in (point.to_full.mean, point.to_full.low, point.to_full.high)
            ),
        ]
        for depth, point in enumerate(record.curve)
    ]
    return (
        "### Every depth",
        f"Mean {code_span(record.metric or '')} over {record.num_samples} samples, higher is better."
        f" Depth 0 is the base model, {record.num_layers} the whole adapter; the"
        f" {100 * record.confidence:.4g} % intervals hold for all depths at once.",
        markdown_table(["depth", "mean score", "difference to full", "low", "high"], rows),
    )


def _facts(record: BoundaryRecord) -> list[list[str]]:
    facts = {
        "samples": record.data_fingerprint and code_span(record.data_fingerprint),
        "adapter": code_span(record.adapter_fingerprint),
        "base model": code_span(record.base_fingerprint),
        "method": code_span(record.method),
        "made": record.created_at.isoformat(timespec="seconds"),
        "fathom": code_span(record.library_version),
    }
    return [[name, value] for name, value in facts.items() if value]


def _interval(difference: Difference) -> Interval:
    return Interval(difference.mean, difference.low, difference.high)
