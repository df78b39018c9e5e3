"""A finished calibration as a Markdown page, beside which lie its curve and its JSON."""

from collections.abc import Iterable, Iterator, Sequence

from boundary.outcome import SampleOutput
from boundary.record import LIBRARY_VERSION
from boundary.report.quoting import code_span, fenced
from boundary.report.report import CalibrationReport, interval_text, number, verdict_sentence

MAX_LINES_NAMED = 100
"""Cut lines that the page lists; the JSON has all of them."""


def report_markdown(report: CalibrationReport, *, curve: str, json: str) -> str:
    """The page. `curve` and `json` are the names of the files beside it.

    Whatever somebody else wrote (names, prompts, outputs) stands in code spans and fenced blocks.
    """
    sections = [
        f"# Calibration of {code_span(report.adapter)}",
        verdict_sentence(report),
        f"![Mean score by depth]({curve})",
        *_scores(report),
        *_depths(report),
        *_layers(report),
        *_outputs(report),
        *_data(report),
        *_reproduction(report),
        f"Everything above, and every number in full, is in [{json}]({json}).",
    ]
    return "\n\n".join(sections) + "\n"


def _scores(report: CalibrationReport) -> Iterator[str]:
    selection = report.selection
    held_out = report.held_out or {}
    layers = {
        "base": "none",
        "chosen": f"below depth {selection.depth}",
        "full": "all",
    }
    rows = [
        [f"{name} (depth {depth})", layers[name], number(report.scores[name]), "", held_out.get(name)]
        for name, depth in (
            ("base", 0), ("chosen", selection.depth), ("full", report.num_layers),
        )
    ]  # fmt: skip
    for name, control in report.controls.items():
        if len(control.masks) == 1:
            (mask,) = control.masks
            where = ", ".join(str(layer_idx) for layer_idx, on in enumerate(mask) if on) or "none"
        else:
            where = f"{len(control.masks)} draws"
        difference = (
            "too few samples"
            if control.difference is None
            else interval_text(control.difference, selection.confidence)
        )
        rows.append([code_span(name), where, number(control.mean), difference, held_out.get(name)])
    yield "## Scores"
    yield (
        f"Mean {code_span(report.metric)} over {selection.num_samples} samples, higher is better."
        f" The chosen depth leaves out {report.share_saved:.0%} of the adapter's LoRA layers."
    )
    header = ["", "layers with LoRA", "mean score", "chosen - this, on the confirming half"]
    if report.held_out is None:
        yield markdown_table(header, [row[:-1] for row in rows])
    else:
        yield markdown_table(
            [*header, "held-out mean score"],
            [[*row[:-1], "" if row[-1] is None else number(float(row[-1]))] for row in rows],
        )
    if report.controls:
        yield "Controls spend the chosen depth's budget of layers in other places."


def _depths(report: CalibrationReport) -> Iterator[str]:
    confidence = f"{100 * report.selection.confidence:.4g} %"
    yield "## Every depth"
    yield (
        f"Depth 0 is the base model, {report.num_layers} the whole adapter. The {confidence}"
        " intervals hold for all depths at once."
    )
    rows = []
    for depth, point in enumerate(report.selection.curve):
        interval = point.interval
        bounds = ("", "") if interval is None else (interval.low, interval.high)
        rows.append(
            [
                f"**{depth}**" if depth == report.selection.depth else str(depth),
                number(point.score),
                number(point.difference, signed=True),
                *(
                    bound if isinstance(bound, str) else number(bound, signed=True)
                    for bound in bounds
                ),
            ]
        )
    yield markdown_table(["depth", "mean score", "difference to full", "low", "high"], rows)


def _layers(report: CalibrationReport) -> Iterator[str]:
    columns = {
        "truth's probability, base": report.lens_base,
        "truth's probability, full": report.lens_full,
        "norm of LoRA's output": report.lora_norms,
    }
    known = {name: values for name, values in columns.items() if values is not None}
    if not known:
        return
    yield "## Layer by layer"
    yield (
        "Means over samples; they explain the curve and decide nothing. The truth's probability is"
        " that of the reference if the layer were the last one (logit lens); the norm is that of"
        " what a layer's LoRA adds (LoRA-drop)."
    )
    rows = [
        [str(layer_idx), *(number(values[layer_idx]) for values in known.values())]
        for layer_idx in range(report.num_layers)
    ]
    yield markdown_table(["layer", *known], rows)


def _outputs(report: CalibrationReport) -> Iterator[str]:
    if not report.outputs:
        return
    yield "## Sample outputs"
    for index, output in enumerate(report.outputs, start=1):
        yield f"### Sample {index}"
        yield "Prompt"
        yield fenced(output.prompt)
        if output.reference:
            yield "Reference"
            yield fenced(output.reference)
        yield from _continuations(report, output)


def _continuations(report: CalibrationReport, output: SampleOutput) -> Iterator[str]:
    names = {report.num_layers: "full", 0: "base"}
    for depth, text in sorted(output.by_depth.items()):
        called = [names[depth]] if depth in names else []
        called += ["chosen"] if depth == report.selection.depth else []
        yield f"Depth {depth}" + (f" ({', '.join(called)})" if called else "")
        yield fenced(text)


def _data(report: CalibrationReport) -> Iterator[str]:
    yield "## What was cut"
    lines = report.truncated_lines
    if not lines:
        yield "Nothing: every prompt fitted the context."
        return
    named = ", ".join(map(str, lines[:MAX_LINES_NAMED]))
    rest = f" and {len(lines) - MAX_LINES_NAMED} more" if len(lines) > MAX_LINES_NAMED else ""
    yield (
        f"The prompts of {len(lines)} lines lost their start, because they were longer than the"
        f" context: {named}{rest}."
    )


def _reproduction(report: CalibrationReport) -> Iterator[str]:
    selection, record = report.selection, report.record
    facts = {
        "seed": str(selection.seed),
        "metric": code_span(report.signature or report.metric),
        "method": "" if record is None else code_span(record.method),
        "tolerance": number(selection.tolerance),
        "confidence": f"{100 * selection.confidence:.4g} %",
        **{
            f"{code_span(name)} fingerprint": code_span(value)
            for name, value in report.known_fingerprints.items()
        },
        "made": "" if record is None else record.created_at.isoformat(timespec="seconds"),
        "fathom": code_span(LIBRARY_VERSION if record is None else record.library_version),
    }
    yield "## How to get the same again"
    yield markdown_table(["", ""], [[name, value] for name, value in facts.items() if value])
    if report.command:
        yield fenced(report.command)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
