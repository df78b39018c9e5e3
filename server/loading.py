"""Settings to a loaded engine, with progress on standard error. Every command starts here.

Where no model is named the embedded demo stands in, with its adapters; adapters that were named
come beside them.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from server import demo
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.errors import ModelError

log = structlog.get_logger(__name__)

ReportProgress = Callable[[str, int, int], None]
"""`(stage, done, total)`; a stage ends when both are equal."""


def with_demo(settings: Settings) -> Settings:
    """The same settings, with the demo's model and adapters where no model is named."""
    if settings.model is not None:
        return settings
    path = demo.model_path()
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the embedded demo is missing at {path}; name a MODEL, or make the demo with"
            " `python -m server.demo.build`"
        )
    return settings.model_copy(
        update={
            "model": str(path),
            "served_model_name": settings.served_model_name or "fathom-demo",
            "adapter": demo.adapters() | settings.adapter,
        }
    )


def load_engine(settings: Settings) -> AsyncEngine:
    """Load and warm up. Blocks for as long as that takes.

    Raises ModelError or AdapterError where the model or a named adapter is refused.
    """
    with progress_on_stderr() as report:
        return AsyncEngine.from_settings(settings, progress=report)


@contextmanager
def progress_on_stderr() -> Iterator[ReportProgress]:
    """Bars on a terminal, elsewhere one line when a stage begins.

    It is a line of the log where that is told such things, so that a server's log is all of one form.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def report_line(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                if logging.getLogger(__name__).isEnabledFor(logging.INFO):
                    log.info("loading", stage=stage, total=total)
                else:
                    sys.stderr.write(f"{stage} ...\n")

        yield report_line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report_bar(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report_bar
