"""A finished calibration as files: a page to read, its curve, and everything for a machine."""

import os
from pathlib import Path

from boundary import whole_file
from boundary.report.curve_svg import Curve, curve_svg
from boundary.report.page import report_markdown
from boundary.report.report import CalibrationReport, to_json

CURVE_NAME, JSON_NAME, PAGE_NAME = "curve.svg", "report.json", "report.md"


def write_report(report: CalibrationReport, directory: str | os.PathLike[str]) -> Path:
    """Write `report.md`, `curve.svg` and `report.json`, and return the path of the first.

    The directory is made if it is missing; files of these names are replaced, others left alone.
    Nothing is written if the report cannot be made. Raises OSError where a file cannot be written; then
    the files of an earlier report are as they were.
    """
    curve = Curve.of_selection(report.selection, report.metric)
    controls = {name: control.mean for name, control in report.controls.items()}
    contents = {
        CURVE_NAME: curve_svg(curve, report.adapter, controls),
        JSON_NAME: to_json(report),
        PAGE_NAME: report_markdown(report, curve=CURVE_NAME, json=JSON_NAME),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole_file.write({directory / name: text.encode() for name, text in contents.items()})
    return directory / PAGE_NAME
