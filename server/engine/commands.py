"""What the engine's thread is told to do between steps."""

from dataclasses import dataclass

from server.engine.background import Task
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class Submit:
    """Add it to the core."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """End it, unless it has ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Work on it between steps."""

    task: Task


@dataclass(frozen=True, slots=True)
class Cancel:
    """End it where it stands."""

    task: Task


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread."""


@dataclass(frozen=True, slots=True)
class DropUnloaded:
    """Give back the slots of adapters that are no more."""


Command = Submit | Abort | DropUnloaded | Begin | Cancel | Stop
