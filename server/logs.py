"""Structured logs on standard error: readable on a terminal, one JSON object a line elsewhere.

The standard library's loggers (uvicorn's, transformers') go through the same door. Called once, by
the commands that run a server; a library that imports Fathom keeps its own logging.

No line holds what clients write or are told. A traceback is its types and places, without local
variables, and an exception's own words, which may repeat a prompt, are left out unless its type is one
that speaks of the machine. Other packages' debug lines stay off: a database driver's are its parameters.
"""

import asyncio
import builtins
import logging
import sys
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

LogFormat = Literal["auto", "json", "console"]

OURS = ("server", "boundary")

SPEAK_OF_THE_MACHINE = {
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, OSError | MemoryError | ImportError)
} | {
    "AcceleratorError",
    "AdapterError",
    "EngineDead",
    "ModelError",
    "OutOfMemoryError",
    "QueueFull",
    "RequestTimeout",
    "StoreError",
    "StoreUnavailable",
}
"""Exceptions, and what derives from them, whose words no client can choose."""

log = structlog.get_logger(__name__)


def configure_logs(
    level: str, log_format: LogFormat = "auto", *, shows_prompts: bool = False
) -> None:
    """Send structlog's and the standard library's records of `level` and above to stderr.

    shows_prompts: whether exceptions are logged in their own words, whatever these repeat.
    """
    is_console = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_terminal_copy,
    ]
    rendering: list[Processor] = [
        structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False, use_rich=False)
        ),
        _Exceptions(shows_words=shows_prompts, as_text=is_console),
    ]
    if is_console:
        rendering.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    else:
        rendering += [
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(threshold, logging.INFO))
    for name in OURS:
        logging.getLogger(name).setLevel(threshold)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else it speaks at every start
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # else it shows every value it keeps


def log_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: asyncio's own puts the exception's words into the message."""
    error = context.get("exception")
    log.error("event loop", problem=context.get("message"), error=error, exc_info=error)


class _Exceptions:
    """Renders exceptions, whether logged as a value or as a traceback, with or without their words."""

    def __init__(self, *, shows_words: bool, as_text: bool) -> None:
        self._shows_words = shows_words
        self._as_text = as_text

    def __call__(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        for key, value in event.items():
            if isinstance(value, BaseException):
                event[key] = self._described(value)
        stacks = event.get("exception")
        if isinstance(stacks, list):
            if not self._shows_words:
                _silence(stacks)
            if self._as_text:
                event["exception"] = "\n".join(_text(stack) for stack in reversed(stacks))
        return event

    def _described(self, error: BaseException) -> str:
        kind = type(error)
        speaks = any(base.__name__ in SPEAK_OF_THE_MACHINE for base in kind.__mro__)
        return f"{kind.__name__}: {error}" if self._shows_words or speaks else kind.__name__


def _silence(stacks: list[dict[str, Any]]) -> None:
    for stack in stacks:
        if stack["exc_type"] not in SPEAK_OF_THE_MACHINE:
            stack["exc_value"] = ""
        stack["exc_notes"] = []
        stack["syntax_error"] = None
        for inner in stack.get("exceptions") or []:
            _silence(inner)


def _text(stack: dict[str, Any]) -> str:
    lines = [f"  {f['filename']}:{f['lineno']} in {f['name']}" for f in stack["frames"]]
    words = f": {stack['exc_value']}" if stack["exc_value"] else ""
    return "\n".join([*lines, stack["exc_type"] + words])


def _without_terminal_copy(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Uvicorn sends each message twice, once with escape codes for a terminal."""
    event.pop("color_message", None)
    return event
