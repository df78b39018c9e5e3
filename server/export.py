"""`fathom export`: an adapter cut at a depth, as a plain PEFT checkpoint.

The cut is `boundary.export.cut`'s. Here is what it cannot know: how many layers the base model has,
which adapters this server refuses, and whether the record beside an adapter is about this adapter.
The base model is loaded for `auto` only, as a record is believed for one content and one base.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from boundary import record
from boundary.export.cut import Export, ExportError, free_place
from boundary.export.cut import export as cut
from server.config import ConfigError
from server.environment import load_settings
from server.errors import AdapterError
from server.loading import progress_on_stderr
from server.logs import configure_logs
from server.model import loader
from server.model.adapter_config import AdapterConfig
from server.model.base_files import layers_of_files
from server.model.checkpoint import read_checkpoint
from server.model.targets import Targets
from server.sources import location
from server.sources.fetcher import local_path

Depth = int | Literal["auto", "full"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and on whose word; `path` is the new checkpoint."""

    adapter: str
    path: str
    depth_from: str
    num_layers_from: str
    num_bytes_saved: int
    percent_saved: float
    export: Export


def export(place: str, *, depth: str, out: Path, model: str | None, as_json: bool) -> int:
    """Write the cut adapter and print what it is."""
    configure_logs("warning")
    wanted = parse_depth(depth)
    if wanted == "auto" and model is None:
        raise ConfigError(
            "--depth: auto needs --model: what boundary.json says is only believed of the base and"
            " the adapter that it was made for"
        )
    adapter = here(place)
    AdapterConfig.read(adapter)
    num_layers: int | None = None
    try:
        free_place(out)  # before anything large is loaded
        if wanted == "auto":
            assert model is not None
            found = calibrated(adapter, model)
            wanted, depth_from = found.depth, record.FILE_NAME
            num_layers, num_layers_from = found.num_layers, "the model"
        else:
            depth_from = "--depth"
            num_layers, num_layers_from = count_layers(adapter, model)
        done = cut(adapter, out, wanted, num_layers)
    except ExportError as error:
        if error.about != "adapter":
            raise ConfigError(f"--{error.about}: {error}") from error
        hint = "" if num_layers is not None else " (no --model is named)"
        raise AdapterError(f"{error}{hint}") from error
    saved = done.num_bytes_before - done.num_bytes_after
    report = ExportReport(
        adapter=place,
        path=str(out),
        depth_from=depth_from,
        num_layers_from=num_layers_from,
        num_bytes_saved=saved,
        percent_saved=round(100 * saved / done.num_bytes_before, 1),
        export=done,
    )
    notes = list(done.notes)
    if (adapter / record.FILE_NAME).exists():
        notes.append(f"{record.FILE_NAME} is not copied: it is about the whole adapter's content")
    if as_json:
        sys.stdout.write(json.dumps(_flat(report, notes)) + "\n")
    else:
        show(report, notes)
    return 0


def here(place: str) -> Path:
    """The adapter's directory, fetched if it lies elsewhere. Raises ConfigError and Fetcher's errors."""
    try:
        return local_path(location.parse(place), load_settings())
    except location.LocationError as error:
        raise ConfigError(f"the adapter {error}") from None


def parse_depth(word: str) -> Depth:
    """`auto`, `full` or a number. Raises ConfigError."""
    named: dict[str, Depth] = {"auto": "auto", "full": "full"}
    if word in named:
        return named[word]
    if re.fullmatch(r"[0-9]{1,9}", word):
        return int(word)
    raise ConfigError(f"--depth: should be a number, auto or full (given {word[:60]!r})")


def calibrated(adapter: Path, model: str) -> record.BoundaryRecord:
    """The record beside the adapter, known to be about this adapter on this base; never depth 0.

    Raises AdapterError with the reason, or ModelError.
    """
    found = _read_record(adapter)
    if found is None:
        raise AdapterError(f"{record.FILE_NAME} is missing beside the adapter: name a depth")
    with progress_on_stderr() as report:
        base = loader.load(model, None, "auto", "auto", report)
    digest = read_checkpoint(adapter, Targets(base.model)).digest
    reason = found.mismatch(base=base.revision, adapter=digest, num_layers=base.num_layers)
    if reason is not None:
        raise AdapterError(f"{record.FILE_NAME} is not about this adapter on this model: {reason}")
    if found.depth == 0:
        raise AdapterError(
            f"{record.FILE_NAME} says depth 0, the base model, for which no adapter is needed"
        )
    return found


def count_layers(adapter: Path, model: str | None) -> tuple[int | None, str]:
    """The base model's number of layers and who says so; None where only the adapter could."""
    if model is not None:
        return layers_of_files(model), "the model"
    found = _read_record(adapter)
    if found is not None:
        return found.num_layers, record.FILE_NAME
    return None, "the adapter's highest layer; the model may have more"


def show(report: ExportReport, notes: list[str]) -> None:
    """A table, then a line for each thing that a user should know."""
    done, console = report.export, Console()
    table = Table(show_header=False, box=None)
    table.add_row("depth", f"{done.depth} of {done.num_layers}", f"depth from {report.depth_from}")
    table.add_row("", "", f"number of layers from {report.num_layers_from}")
    table.add_row("layers kept", layer_ranges(done.layers_kept))
    table.add_row("layers dropped", layer_ranges(done.layers_dropped))
    table.add_row("tensors", f"{done.num_tensors_before} -> {done.num_tensors_after}")
    table.add_row(
        "weights",
        f"{decimal(done.num_bytes_before)} -> {decimal(done.num_bytes_after)}",
        f"{report.num_bytes_saved} bytes saved, {report.percent_saved} %",
    )
    console.print(table)
    for note in notes:
        console.print(escape(note))
    console.print(f"written: {escape(report.path)}")


def layer_ranges(layers: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as `0-2, 5`."""
    ranges: list[list[int]] = []
    for layer_idx in layers:
        if ranges and ranges[-1][-1] == layer_idx - 1:
            ranges[-1][1:] = [layer_idx]
        else:
            ranges.append([layer_idx])
    return ", ".join("-".join(map(str, ends)) for ends in ranges) or "none"


def _flat(report: ExportReport, notes: list[str]) -> dict[str, object]:
    fields: dict[str, object] = asdict(report)
    del fields["export"]
    return fields | asdict(report.export) | {"notes": notes}


def _read_record(adapter: Path) -> record.BoundaryRecord | None:
    path = adapter / record.FILE_NAME
    if not path.exists():
        return None
    try:
        return record.read(path)
    except record.RecordError as error:
        raise AdapterError(str(error)) from error
