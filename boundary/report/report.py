"""One finished calibration, as its report tells it: the numbers, in words and as JSON.

Made by `conclude` for whoever ran the calibration; `report_table`, `report_markdown` and
`report_directory` show it. Depth 0 is the base model, `num_layers` the whole adapter ("full").
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from boundary.dataset import Dataset
from boundary.intervals import Interval
from boundary.options import CalibrationOptions
from boundary.outcome import Calibration, ControlResult, SampleOutput
from boundary.record import LIBRARY_VERSION, BoundaryRecord
from boundary.selection import MIN_SAMPLES, Selection

JSON_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """Everything that a report says.

    adapter: its name, any text.
    record: None where there were too few samples for one.
    controls: by name, such as `top-k` and `random-k`.
    lens_base, lens_full, lora_norms: see `diagnostics`; one value a layer, the mean over samples.
    truncated_lines: lines of the data whose prompt was cut to fit the context.
    held_out: mean scores on data that took no part, by `base`, `chosen`, `full` and the controls'
        names; None if there was none.
    signature: how the metric is computed, if there is more to say than its name.
    lora_layers: the layers in which the adapter has LoRA at all; None for every layer.
    fingerprints: of `base`, `adapter` and `data`; a record's own come first.
    command: what to type to get the same again.

    Raises ValueError for values a layer that are not `num_layers` many, and for depths, layers or
    masks that the model does not have.
    """

    adapter: str
    metric: str
    selection: Selection
    record: BoundaryRecord | None = None
    controls: Mapping[str, ControlResult] = field(default_factory=dict)
    lens_base: tuple[float, ...] | None = None
    lens_full: tuple[float, ...] | None = None
    lora_norms: tuple[float, ...] | None = None
    outputs: tuple[SampleOutput, ...] = ()
    truncated_lines: tuple[int, ...] = ()
    held_out: Mapping[str, float] | None = None
    signature: str | None = None
    lora_layers: tuple[int, ...] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self) -> None:
        num_layers = self.num_layers
        for name in ("lens_base", "lens_full", "lora_norms"):
            values = getattr(self, name)
            if values is not None and len(values) != num_layers:
                raise ValueError(f"{name} must have {num_layers} values, got {len(values)}")
        for name, control in self.controls.items():
            for mask in control.masks:
                if len(mask) != num_layers:
                    raise ValueError(
                        f"control {name!r}: a mask must have {num_layers} values, got {len(mask)}"
                    )
        for layer_idx in self.lora_layers or ():
            if not 0 <= layer_idx < num_layers:
                raise ValueError(f"lora_layers: there is no layer {layer_idx} of {num_layers}")
        for output in self.outputs:
            for depth in output.by_depth:
                if not 0 <= depth <= num_layers:
                    raise ValueError(f"outputs: depth must be 0 to {num_layers}, got {depth}")

    @property
    def num_layers(self) -> int:
        """The full depth."""
        return len(self.selection.curve) - 1

    @property
    def scores(self) -> dict[str, float]:
        """Mean score over all samples of `base`, `chosen` and `full`."""
        curve = self.selection.curve
        return {
            "base": curve[0].score,
            "chosen": curve[self.selection.depth].score,
            "full": curve[-1].score,
        }

    @property
    def share_saved(self) -> float:
        """Of the layers in which a token meets LoRA, the share that the chosen depth leaves out."""
        layers = range(self.num_layers) if self.lora_layers is None else self.lora_layers
        left_out = sum(layer_idx >= self.selection.depth for layer_idx in layers)
        return left_out / len(layers) if layers else 0.0

    @property
    def known_fingerprints(self) -> dict[str, str]:
        """Of the base model, the adapter and the data, as far as known."""
        known = dict(self.fingerprints)
        if self.record is not None:
            known["base"] = self.record.base_fingerprint
            known["adapter"] = self.record.adapter_fingerprint
            if self.record.data_fingerprint is not None:
                known["data"] = self.record.data_fingerprint
        return known


def conclude(
    calibration: Calibration,
    dataset: Dataset,
    options: CalibrationOptions,
    *,
    adapter: str,
    layers: Collection[int],
    fingerprints: Mapping[str, str],
    outputs: tuple[SampleOutput, ...] = (),
    signature: str | None = None,
) -> CalibrationReport:
    """The report of a calibration that just ended, with the record that it comes to.

    There is none where there were too few samples, or where one of the three fingerprints (`base`,
    `adapter`, `data`) is not known. The other arguments are the report's own.
    """
    selection, lens = calibration.selection, calibration.lens
    record = None
    if selection.verdict != "too_few" and fingerprints.keys() >= {"base", "adapter", "data"}:
        record = BoundaryRecord.selected(
            selection, method=options.method_word, metric=options.metric,
            base=fingerprints["base"], adapter=fingerprints["adapter"], data=fingerprints["data"],
        )  # fmt: skip
    return CalibrationReport(
        adapter=adapter,
        metric=options.metric,
        selection=selection,
        record=record,
        controls=calibration.controls,
        lens_base=None if lens is None else lens.base,
        lens_full=None if lens is None else lens.full,
        lora_norms=calibration.lora_norms,
        outputs=outputs,
        truncated_lines=dataset.truncated_lines,
        signature=signature,
        lora_layers=tuple(sorted(layers)),
        fingerprints=fingerprints,
    )


def verdict_sentence(report: CalibrationReport) -> str:
    """What was found, for somebody who never saw a verdict before."""
    selection = report.selection
    num_layers = report.num_layers
    if selection.verdict == "too_few":
        needed = selection.num_samples_needed or MIN_SAMPLES
        return (
            f"{selection.num_samples} samples are too few to conclude anything: at least"
            f" {MIN_SAMPLES} are needed, and with the differences seen so far about {needed}."
            f" The whole adapter is kept (depth {num_layers})."
        )
    assert selection.confirmed_on is not None  # every other verdict rests on two halves
    proposed = selection.proposed_depth
    against_full = (
        f"{interval_text(selection.confirmed_on.to_full, selection.confidence)} on the"
        f" {len(selection.confirmed_on.sample_indices)} samples that took no part in choosing it"
    )
    fewer = f"{report.share_saved:.0%} fewer LoRA layer applications"
    if selection.verdict == "improves":
        return (
            f"Depth {selection.depth} of {num_layers} scores higher than the whole adapter, with"
            f" {fewer}: the difference is {against_full}."
        )
    if selection.verdict == "equal_cheaper":
        return (
            f"Depth {selection.depth} of {num_layers} saves work, {fewer}, and loses less than the"
            f" tolerance of {number(selection.tolerance)} against the whole adapter: the"
            f" difference is {against_full}."
        )
    if proposed is None or proposed >= num_layers:
        return f"Keep the whole adapter (depth {num_layers}): no smaller depth was proposed."
    more = selection.num_samples_needed
    return (
        f"Keep the whole adapter (depth {num_layers}): depth {proposed} was proposed, but not"
        f" confirmed; its difference to full is {against_full}."
        + (f" About {more} samples might be enough to confirm it." if more else "")
        + " This does not say that the whole adapter is better."
    )


def interval_text(interval: Interval, confidence: float) -> str:
    """`+0.0310 (95 % interval +0.0100 to +0.0520)`."""
    low, high = number(interval.low, signed=True), number(interval.high, signed=True)
    mean = number(interval.mean, signed=True)
    return f"{mean} ({100 * confidence:.4g} % interval {low} to {high})"


def number(value: float, *, signed: bool = False) -> str:
    """Four decimals, or three figures where those would show nothing."""
    sign = "+" if signed else ""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return format(value, f"{sign}.4f")
    return format(value, f"{sign}.3g")


def to_json(report: CalibrationReport) -> str:
    """The whole report as strict JSON in one line a field, the same for the same report.

    A diagnostic that is no finite number is null, and half a surrogate pair U+FFFD: JSON has
    neither. Masks are given as the layers that had LoRA.
    """
    fields: dict[str, Any] = {
        "schema_version": JSON_SCHEMA_VERSION,
        "library_version": LIBRARY_VERSION,
        "adapter": report.adapter,
        "metric": report.metric,
        "signature": report.signature,
        "verdict": report.selection.verdict,
        "verdict_in_words": verdict_sentence(report),
        "depth": report.selection.depth,
        "num_layers": report.num_layers,
        "scores": report.scores,
        "share_saved": report.share_saved,
        "selection": asdict(report.selection),
        "record": None if report.record is None else report.record.model_dump(mode="json"),
        "controls": {
            name: {
                "mean": control.mean,
                "difference": None if control.difference is None else asdict(control.difference),
                "layers": [
                    [layer_idx for layer_idx, applies in enumerate(mask) if applies]
                    for mask in control.masks
                ],
            }
            for name, control in report.controls.items()
        },
        "lens_base": report.lens_base,
        "lens_full": report.lens_full,
        "lora_norms": report.lora_norms,
        "lora_layers": report.lora_layers,
        "outputs": [
            {
                "prompt": output.prompt,
                "reference": output.reference,
                "by_depth": {str(depth): text for depth, text in sorted(output.by_depth.items())},
            }
            for output in report.outputs
        ],
        "truncated_lines": report.truncated_lines,
        "held_out": None if report.held_out is None else dict(report.held_out),
        "fingerprints": report.known_fingerprints,
        "command": report.command,
    }
    lines = (
        f"{json.dumps(name)}: {json.dumps(_strict(value), ensure_ascii=False, allow_nan=False)}"
        for name, value in fields.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _strict(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {_strict(name): _strict(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_strict(item) for item in value]
    return value
