"""Steps on a CPU from programs: one for all numbers of rows, where the model allows it, prompts' among them.

A step of a small batch spends a fifth of its time between its matrix products, most of it in the model's
Python and in operators on a few numbers. A program does the same work without either. Which rows apply which
adapter how deep, and where each row's keys and values lie, it is told before each run (`pass.h`). Where a
step has operators in it that only torch does, each number of decode rows has a program of its own, made when
that number has come often, and prompts run the model.

Used by `runner`, which runs the model for every other step, and for every step of a model that cannot be
replayed.
"""

from collections.abc import Callable

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model.batch import PackedRows
from server.model.foreign_hooks import ForeignHooks
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import LoraStep
from server.model.native.library import Library
from server.model.native.step import NativeStep
from server.model.replay.noted_step import NotedStep, StepNoter
from server.model.replay.tape import NotReplayable

log = structlog.get_logger(__name__)

MIN_STEPS = 4
"""Steps, or steps of a number of rows, after which there is a program."""
_TOLERANCE = 1e-2
"""Largest ||replayed - run|| / ||run|| of the logits at which a program is believed."""


class StepReplay:
    """The programs of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: LoraHooks,
        foreign_hooks: ForeignHooks,
        cache: KVCache,
        library: Library,
        max_num_seqs: int,
        max_step_tokens: int,
    ) -> None:
        self._hooks = hooks
        self._foreign_hooks = foreign_hooks
        self._noter = StepNoter(model, cache, library)
        self._max_decodes = (
            max_num_seqs + 1
        )  # so that those which are checked have fewer than were noted
        self._max_rows = max_step_tokens
        self._is_by_rows = True
        self._noted: dict[int, NotedStep] = {}
        """By the most decode rows that they can be run with."""
        self._num_seen: dict[int, int] = {}
        self.why_off: str | None = None
        """Why no step is replayed any more, None while they are."""
        self.num_replays = 0
        self.num_chains_run = 0

    def run(
        self,
        rows: PackedRows,
        attention: NativeStep,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Logits `[num_wanted, vocab_size]` of a step, valid until the next one.

        attention, lora: this step's; hooks are installed. before: see `Program.run`. None for
        a step that has to run the model: then nothing has been computed.
        """
        if self.why_off is not None or not self._is_served(rows, lora):
            return None
        try:
            noted = self._find(rows)
        except NotReplayable as reason:
            self._turn_off(str(reason))
            return None
        if noted is None:
            return None
        if not noted.has_to_be_checked(rows):
            return self._replay(noted, rows, attention, lora, before)
        if not rows.wanted:  # nothing could be compared
            return None
        logits = self._replay(noted, rows, attention, lora)
        wanted = None if len(rows.wanted) == len(rows.token_ids) else rows.wanted
        expected = self._noter.forward(noted.inputs, len(rows.token_ids), attention, lora, wanted)
        if not _is_close(logits, expected):
            self._turn_off("a replayed step gives other logits than the model")
        noted.was_checked(rows)
        return expected

    @property
    def num_bytes(self) -> int:
        """What programs compute in, for as long as the model is there."""
        return self._noter.arena.num_bytes

    def _is_served(self, rows: PackedRows, lora: LoraStep | None) -> bool:
        if not rows.token_ids or not (rows.are_decodes or self._is_by_rows):
            return False
        if lora is not None and not self._hooks.are_compiled:
            return False
        return not self._foreign_hooks.exist()  # they would not be called

    def _find(self, rows: PackedRows) -> NotedStep | None:
        """The program for such a step, noted now if it is time to. Raises NotReplayable."""
        num_rows = len(rows.token_ids)
        is_by_rows = self._is_by_rows and (num_rows < self._max_decodes or not rows.are_decodes)
        most = self._max_decodes if is_by_rows else num_rows
        noted = self._noted.get(most)
        if noted is None:
            seen = self._num_seen[most] = self._num_seen.get(most, 0) + 1
            if seen < MIN_STEPS:
                return None
            if is_by_rows:
                noted = self._noter.up_to(most, self._max_rows)
                self._is_by_rows = noted is not None
            if noted is None and rows.are_decodes:
                most, noted = num_rows, self._noter.exactly(num_rows)
            if noted is None:
                return None
            self._noted[most] = noted
        return noted if noted.takes(rows) else None

    def _replay(
        self,
        noted: NotedStep,
        rows: PackedRows,
        attention: NativeStep,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor:
        logits = noted.run(rows, attention, self._hooks, lora, before)
        self.num_replays += 1
        self.num_chains_run += noted.program.num_chains
        return logits

    def _turn_off(self, reason: str) -> None:
        self.why_off = reason
        self._noted.clear()
        log.info("steps run the model's own Python", reason=reason)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Logits of an adapter that is not finite are not, and need not be equal."""
    is_finite = expected.isfinite()
    difference = torch.where(is_finite, actual.float() - expected.float(), 0.0)
    norm = torch.where(is_finite, expected.float(), 0.0).norm()
    return bool(difference.norm() <= _TOLERANCE * norm)
