"""`fathom calibrate`: find and prove the depth of one adapter or many, on this machine.

Runs the same pipeline as a server's admin job, on an engine of its own: one adapter after the other,
then one table. What is wrong with any adapter's data is known before the first is calibrated.
"""

import asyncio
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from boundary import dataset as datasets
from boundary import record as records
from boundary.dataset import Dataset, DatasetError
from boundary.options import CalibrationOptions
from boundary.progress import Progress
from boundary.report.directory import write_report
from boundary.report.quoting import printable
from boundary.report.report import CalibrationReport, to_json, verdict_sentence
from boundary.report.table import report_table
from server.calibration import pipeline
from server.calibration.generation import GenerationOptions
from server.calibration.held_out import HeldOut, held_out_scores
from server.calibration.outcome import Outcome
from server.config import ConfigError, Settings
from server.engine.protocol import Engine
from server.engine.request import AdapterRef
from server.errors import BadRequest, FathomError
from server.loading import load_engine, progress_on_stderr, with_demo
from server.logs import configure_logs
from server.sources import location
from server.sources.location import RemoteAdapter

VALID_NAME = "valid.jsonl"
"""Samples beside an adapter's weights, used where no data is named."""


@dataclass(frozen=True, slots=True)
class Files:
    """`--data` or `--test`: one file for every adapter, or one by name."""

    flag: str
    common: Path | None
    by_name: Mapping[str, Path]

    def of(self, name: str) -> Path | None:
        """The file of one adapter."""
        return self.by_name.get(name, self.common)


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter, ready to calibrate."""

    adapter: AdapterRef
    data: Dataset
    test: Dataset | None


def calibrate(
    settings: Settings,
    places: Sequence[str],
    *,
    names: Sequence[str],
    data: Sequence[str],
    test: Sequence[str],
    options: CalibrationOptions,
    generation: GenerationOptions,
    max_samples: int | None,
    write: bool,
    report: Path | None,
    as_json: bool,
) -> int:
    """Calibrate the adapters at `places` and those of these `names`; all there are if none is given.

    Returns 1 if one of them had too few samples to conclude anything, or its report found no room: what
    was found is shown all the same.
    """
    configure_logs("warning")
    data_files, test_files = parse_files("--data", data), parse_files("--test", test)
    settings = with_demo(settings)
    given = by_name(places)
    settings = with_adapters(settings, given)
    if names:
        names = [*names, *given]
    names = wanted_names(settings, names)
    for name in names if write else ():
        if isinstance(settings.adapter[name], RemoteAdapter):
            raise ConfigError(
                f"--write: {name!r} lies at {settings.adapter[name]}, where nothing is written;"
                " --report keeps what was found"
            )
    for files in (data_files, test_files):
        unknown = sorted(files.by_name.keys() - set(names))
        if unknown:
            raise ConfigError(f"{files.flag}: no adapter {unknown[0]!r} is calibrated here")
    engine = load_engine(settings)
    generation = replace(generation, max_num_seqs=settings.max_num_seqs)
    outcomes: list[Outcome] = []
    held_out: dict[str, HeldOut] = {}
    has_reports = True
    try:
        jobs = [
            asyncio.run(prepare(engine, name, data_files, test_files, max_samples))
            for name in names
        ]
        for job in jobs:
            pipeline.check(job.data, options, generation, engine.info.max_model_len)
        for job in jobs:
            outcome, tested = asyncio.run(run(engine, job, options, generation))
            outcomes.append(outcome)
            if tested is not None:
                held_out[job.adapter.name] = tested
            if report is not None:
                folder = report / job.adapter.name if len(jobs) > 1 else report
                has_reports &= keep_report(outcome.report, folder)
            if write:
                write_record(outcome, Path(job.adapter.path))
    finally:
        engine.shutdown()
    shown = report if has_reports else None
    show([outcome.report for outcome in outcomes], held_out, shown, as_json=as_json)
    return int(not has_reports or any(outcome.record is None for outcome in outcomes))


def parse_files(flag: str, given: Sequence[str]) -> Files:
    """`FILE` for every adapter and `NAME=FILE` for one. Raises ConfigError."""
    common: Path | None = None
    by_name: dict[str, Path] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if separator and not Path(text).exists():
            if name in by_name:
                raise ConfigError(f"{flag}: names {name!r} twice")
            by_name[name] = Path(path)
        elif common is not None:
            raise ConfigError(f"{flag}: {text!r} is a second file; for one each, give NAME=FILE")
        else:
            common = Path(text)
    return Files(flag, common, by_name)


def by_name(places: Sequence[str]) -> dict[str, Path | RemoteAdapter]:
    """Adapters under the names of their folders or repositories. Raises ConfigError."""
    found: dict[str, Path | RemoteAdapter] = {}
    for text in places:
        try:
            place = location.parse(text)
        except location.LocationError as error:
            raise ConfigError(f"the adapter {error}") from None
        if isinstance(place, Path) and not place.is_dir():
            raise ConfigError(f"no adapter at {text!r}")
        name = place.resolve().name if isinstance(place, Path) else place.name
        if name in found:
            raise _named_alike(name)
        found[name] = place
    return found


def with_adapters(settings: Settings, given: Mapping[str, Path | RemoteAdapter]) -> Settings:
    """The same settings, with more adapters."""
    for name in given:
        if name in settings.adapter:
            raise _named_alike(name)
    fields = settings.model_dump(exclude_unset=True) | {"adapter": {**settings.adapter, **given}}
    return Settings.model_validate(fields)


def _named_alike(name: str) -> ConfigError:
    return ConfigError(f"two adapters are named {name!r}: give one by --adapter NAME=PATH")


def wanted_names(settings: Settings, names: Sequence[str]) -> list[str]:
    """What to calibrate. Raises ConfigError for a name that no adapter has."""
    if not settings.adapter:
        raise ConfigError("no adapter is named: fathom calibrate MODEL ADAPTER --data FILE")
    for name in names:
        if name not in settings.adapter:
            known = ", ".join(settings.adapter)
            raise ConfigError(f"--name: no adapter is named {name!r}; there are {known}")
    return list(dict.fromkeys(names)) or list(settings.adapter)


async def prepare(
    engine: Engine, name: str, data: Files, test: Files, max_samples: int | None
) -> Job:
    """Read an adapter's samples. Raises BadRequest with file, line and field."""
    adapter = await engine.resolve(name)
    place = location.parse(adapter.path)
    beside = place / VALID_NAME if isinstance(place, Path) else None
    path = data.of(name) or (beside if beside is not None and beside.is_file() else None)
    if path is None:
        missing = f", and there is no {beside}" if beside is not None else ""
        raise ConfigError(f"--data: names no file for {name!r}{missing}")
    test_path = test.of(name)
    return Job(
        adapter,
        read(engine, path, max_samples),
        None if test_path is None else read(engine, test_path, None),
    )


def read(engine: Engine, path: Path, max_samples: int | None) -> Dataset:
    """A data set, at most its first `max_samples` samples."""
    try:
        return datasets.load(path, engine.tokenizer, engine.info.max_model_len, first=max_samples)
    except DatasetError as error:
        raise BadRequest(f"{path}: {error}", param="data") from error


async def run(
    engine: Engine, job: Job, options: CalibrationOptions, generation: GenerationOptions
) -> tuple[Outcome, HeldOut | None]:
    """One calibration, with progress on standard error, and what its depth is worth on `job.test`."""
    name = job.adapter.name
    with progress_on_stderr() as tell:

        def on_progress(progress: Progress) -> None:
            tell(f"{name}: {progress.stage}", progress.done, progress.total)

        try:
            outcome = await pipeline.calibrate(
                engine, job.adapter, job.data, options, generation, on_progress
            )
            tested = None
            if job.test is not None:
                tested = await held_out_scores(
                    engine, job.adapter, job.test, outcome, options, generation, on_progress
                )
        except ValueError as error:
            raise BadRequest(f"{name}: {error}") from error
    report = replace(
        outcome.report, held_out=None if tested is None else tested.scores, command=command_line()
    )
    return replace(outcome, report=report), tested


def command_line() -> str:
    """What was typed, to type it again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def keep_report(report: CalibrationReport, folder: Path) -> bool:
    """Write the report's files; whether there was room. An earlier report stays where there was none."""
    try:
        write_report(report, folder)
    except OSError as error:
        sys.stderr.write(f"{folder}: the report cannot be written: {error.strerror}\n")
        return False
    return True


def write_record(outcome: Outcome, folder: Path) -> None:
    """Put the record beside the adapter's weights, unless a confirmed depth lies there already.

    `keep_full` says that nothing was shown, which takes nothing back.
    """
    if outcome.record is None:
        return
    path = folder / records.FILE_NAME
    if not outcome.changes_depth and path.exists():
        sys.stderr.write(f"{path} stays as it is: the verdict is {outcome.record.verdict}\n")
        return
    try:
        records.write(outcome.record, path)
    except records.RecordError as error:
        raise FathomError(f"{folder}: {error}") from error
    sys.stderr.write(f"wrote {path}\n")


def show(
    reports: Sequence[CalibrationReport],
    held_out: Mapping[str, HeldOut],
    folder: Path | None,
    *,
    as_json: bool,
) -> None:
    """All calibrations in one table, or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps([json.loads(to_json(report)) for report in reports]) + "\n")
        return
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(report_table(reports))
    if held_out:
        console.print(held_out_table(held_out))
    for report in reports:
        console.print(f"{report.adapter}: {verdict_sentence(report)}", markup=False)
        for line in report.truncated_lines[:5]:
            console.print(f"  the prompt of line {line} was cut to fit the context", markup=False)
    if folder is not None:
        console.print(f"reports are in {folder}", markup=False)


def held_out_table(held_out: Mapping[str, HeldOut]) -> Table:
    """Mean scores on the samples of `--test`, a row an adapter."""
    names = list(dict.fromkeys(name for found in held_out.values() for name in found.scores))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("held out", "n", "k", *names):
        table.add_column(column, justify="left" if column == "held out" else "right")
    for adapter, found in held_out.items():
        scores = (f"{found.scores[name]:.4f}" if name in found.scores else "" for name in names)
        k = "" if found.k is None else str(found.k)
        table.add_row(*map(Text, (printable(adapter), str(found.num_samples), k, *scores)))
    return table
