"""What layers need for one step: entered with `with`, gone after it.

Attention functions and LoRA hooks are called by transformers' own modules, which do not all pass keyword
arguments down; they find the step here. A context variable, so that two engines in one process,
each on its own thread, never see each other's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.model.attention import Attention
    from server.model.gathered_step import GatheredStep
    from server.model.lora import LoraPlan
    from server.model.wanted_rows import WantedRows


@dataclass(frozen=True, slots=True)
class StepContext:
    """One forward pass."""

    attention: Attention
    lora: LoraPlan | GatheredStep | None = None
    wanted: WantedRows | None = None
    """None where all rows are."""


_current: ContextVar[StepContext | None] = ContextVar("fathom_step", default=None)


def find() -> StepContext | None:
    """The step of this thread, None outside of one."""
    return _current.get()


def current() -> StepContext:
    """The step of this thread. Raises LookupError outside of one."""
    found = _current.get()
    if found is None:
        raise LookupError("paged attention was called outside of a step")
    return found


@contextmanager
def step(context: StepContext) -> Iterator[None]:
    """Make `context` the current step until the block ends, however it ends."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
