"""What the bench knows of a peer: how it is made, what has to run for a case, what it cannot do."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.peers.cases import Case
from tests.bench.peers.models import Models
from tests.bench.peers.side import Side


@dataclass(frozen=True, slots=True)
class Place:
    """Where peers are made and run."""

    root: Path
    """The bench's output; environments lie below it."""
    checkout: Path
    fathom_python: Path
    models: Models

    def log(self, name: str) -> Path:
        """A log file of a process of that name."""
        return self.root / "log" / f"{name}.log"


class Peer(Protocol):
    """A server or library that people use today; or Fathom itself."""

    name: str
    title: str
    packages: Sequence[str]
    """Distributions whose versions the report states."""
    cannot: Mapping[str, str]
    """Case -> why there is no such number."""
    notes: Mapping[str, str]
    """Case -> what a reader of its number must know."""

    def prepare(self, place: Place) -> Path:
        """Make its environment and its form of the models where missing; give its interpreter."""

    def variant(self, case: Case) -> str:
        """The name of what has to run for a case; cases of one variant share its processes."""

    def serve(self, variant: str, place: Place) -> AbstractContextManager[Side]:
        """Run one variant, ready to be asked."""
