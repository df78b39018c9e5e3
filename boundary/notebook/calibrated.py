"""What a calibration in a notebook comes to: shown where it is the last line of a cell, and saved."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from boundary import record as records
from boundary.notebook.identity import AdapterContent, Unknowable
from boundary.outcome import Calibration
from boundary.record import BoundaryRecord, RecordError
from boundary.report.card import update_card
from boundary.report.curve_svg import Curve, curve_svg
from boundary.report.directory import write_report
from boundary.report.quoting import printable
from boundary.report.report import CalibrationReport, number, verdict_sentence


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Calibrated:
    """A finished calibration of the adapter of a PEFT model.

    calibration: depth, scores and controls, as `boundary.calibration` found them.
    report: the same with everything that a report says.
    content: the adapter as it was in memory.
    why_no_record: None where there is a record.
    """

    calibration: Calibration
    report: CalibrationReport
    content: AdapterContent
    why_no_record: str | None = None

    @property
    def depth(self) -> int:
        """What to serve the adapter at: the chosen depth, or all layers."""
        return self.calibration.selection.depth

    @property
    def verdict(self) -> str:
        """`improves`, `equal_cheaper`, `keep_full` or `too_few`."""
        return self.calibration.selection.verdict

    @property
    def record(self) -> BoundaryRecord | None:
        """What `save` writes; None where `why_no_record` says why."""
        return self.report.record

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the record as `boundary.json`, and return where.

        path: the adapter's directory, or the file. If the adapter's weights lie there they must be
            those that were calibrated, whatever dtype they were saved in, and the record is made
            out to that file of weights.
        overwrite: lets even a verdict of `keep_full`, which takes nothing back, replace a record.

        Raises RecordError if there is no record, if other weights lie there, if the verdict is
        `keep_full` and a record lies there already, or if writing fails.
        """
        path = Path(path)
        path = path / records.FILE_NAME if path.is_dir() else path
        record = self._made_out_to(path.parent)
        if record.verdict == "keep_full" and path.exists() and not overwrite:
            raise RecordError(
                f"{path.name!r} is there already, and keep_full says that nothing was shown, not that"
                " full is better than what earlier samples confirmed: say overwrite=True to replace it"
            )
        records.write(record, path)
        return path

    def update_card(self, directory: str | os.PathLike[str]) -> Path:
        """Write or renew the section of the adapter's model card, `README.md`; see `report.card`.

        Raises RecordError as `save` does, and OSError.
        """
        return update_card(self._made_out_to(Path(directory)), directory)

    def write_report(self, directory: str | os.PathLike[str]) -> Path:
        """The whole report as files: a page, its curve, and JSON. Raises OSError."""
        return write_report(self.report, directory)

    def _made_out_to(self, directory: Path) -> BoundaryRecord:
        if self.record is None:
            raise RecordError(f"there is no record: {self.why_no_record}")
        try:
            fingerprint = self.content.beside(directory)
        except Unknowable as error:
            raise RecordError(str(error)) from error
        return self.record.model_copy(update={"adapter_fingerprint": fingerprint})

    def __repr__(self) -> str:
        lines = [f"{printable(self.report.adapter)}: {verdict_sentence(self.report)}", ""]
        width = max(map(len, _COLUMNS))
        lines += ["  ".join(cell.rjust(width) for cell in row) for row in self._rows(_COLUMNS)]
        if self.why_no_record is not None:
            lines += ["", f"no record: {self.why_no_record}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        curve = Curve.of_selection(self.report.selection, self.report.metric)
        controls = {name: control.mean for name, control in self.report.controls.items()}
        drawn = curve_svg(curve, self.report.adapter, controls).encode()
        # As an image, so that its style and ids stay its own.
        source = f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}"
        sentence = escape(verdict_sentence(self.report))
        cells = [
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(("th", *["td"] * self._num_rows), self._rows(_COLUMNS), strict=True)
        ]
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        missing = "" if self.why_no_record is None else f"<p>{escape(self.why_no_record)}</p>"
        return (
            f"<div><p><b>{escape(printable(self.report.adapter))}</b>: {sentence}</p>{missing}"
            f'<img alt="{sentence}" src="{source}">'
            f"<details><summary>Every depth</summary><table>{table}</table></details></div>"
        )

    @property
    def _num_rows(self) -> int:
        return len(self.report.selection.curve)

    def _rows(self, header: Sequence[str]) -> list[list[str]]:
        """A header, then a row a depth; the chosen one has a mark."""
        rows = [list(header)]
        for depth, point in enumerate(self.report.selection.curve):
            interval = point.interval
            bounds = (None, None) if interval is None else (interval.low, interval.high)
            rows.append(
                [
                    f"> {depth}" if depth == self.depth else str(depth),
                    number(point.score),
                    number(point.difference, signed=True),
                    *("" if bound is None else number(bound, signed=True) for bound in bounds),
                ]
            )
        return rows


_COLUMNS = ("depth", "mean score", "to full", "low", "high")
