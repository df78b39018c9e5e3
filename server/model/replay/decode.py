"""Decode steps on a CPU from programs: one for all numbers of rows, where the model allows it.

A step of a small batch spends a fifth of its time between its matrix products, most of it in the model's
Python and in operators on a few numbers. A program does the same work without either. Which rows apply which
adapter how deep, and where each row's keys and values lie, it is told before each run (`pass.h`). Where a
step has operators in it that only torch does, each number of rows has a program of its own, made when that
number has come often.

Used by `runner` for steps of one token a sequence; every other step, and every step of a model that cannot
be replayed, runs the model.
"""

from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model.batch import BatchedSequence
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


class DecodeReplay:
    """The programs of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: LoraHooks,
        foreign_hooks: ForeignHooks,
        cache: KVCache,
        library: Library,
        max_num_seqs: int,
    ) -> None:
        self._hooks = hooks
        self._foreign_hooks = foreign_hooks
        self._noter = StepNoter(model, cache, library)
        self._max_rows = (
            max_num_seqs + 1
        )  # so that steps which are checked have fewer than were noted
        self._is_by_rows = True
        self._noted: dict[int, NotedStep] = {}
        """By the most rows that they can be run with."""
        self._num_seen: dict[int, int] = {}
        self.why_off: str | None = None
        """Why no step is replayed any more, None while they are."""
        self.num_replays = 0
        self.num_chains_run = 0

    def run(
        self,
        batch: Sequence[BatchedSequence],
        attention: NativeStep,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Logits `[num_rows, vocab_size]` of a step in its order, valid until the next one.

        attention, lora: this step's; hooks are installed. before: see `Program.run`. None for
        a step that has to run the model: then nothing has been computed.
        """
        num_rows = len(batch)
        if self.why_off is not None or not self._is_served(batch, lora):
            return None
        try:
            noted = self._find(num_rows)
        except NotReplayable as reason:
            self._turn_off(str(reason))
            return None
        if noted is None:
            return None
        if not noted.has_to_be_checked(num_rows):
            return self._replay(noted, batch, attention, lora, before)
        logits = self._replay(noted, batch, attention, lora)
        expected = self._noter.forward(noted.inputs, num_rows, attention, lora)
        if not _is_close(logits, expected):
            self._turn_off("a replayed step gives other logits than the model")
        noted.checked.append(num_rows)
        return expected

    def _is_served(self, batch: Sequence[BatchedSequence], lora: LoraStep | None) -> bool:
        if not batch or any(len(s.token_ids) != 1 or s.num_logits != 1 for s in batch):
            return False
        if lora is not None and not self._hooks.are_compiled:
            return False
        return not self._foreign_hooks.exist()  # they would not be called

    def _find(self, num_rows: int) -> NotedStep | None:
        """The program for so many rows, noted now if it is time to. Raises NotReplayable."""
        max_rows = self._max_rows if self._is_by_rows and num_rows < self._max_rows else num_rows
        noted = self._noted.get(max_rows)
        if noted is not None:
            return noted
        seen = self._num_seen[max_rows] = self._num_seen.get(max_rows, 0) + 1
        if seen < MIN_STEPS:
            return None
        if max_rows != num_rows:
            noted = self._noter.up_to(max_rows)
            self._is_by_rows = noted is not None
        if noted is None:
            max_rows, noted = num_rows, self._noter.exactly(num_rows)
        self._noted[max_rows] = noted
        return noted

    def _replay(
        self,
        noted: NotedStep,
        batch: Sequence[BatchedSequence],
        attention: NativeStep,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor:
        logits = noted.run(batch, attention, self._hooks, lora, before)
        self.num_replays += 1
        self.num_chains_run += noted.program.num_chains
        return logits

    def _turn_off(self, reason: str) -> None:
        self.why_off = reason
        self._noted.clear()
        log.info("decode steps run the model's own Python", reason=reason)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Logits of an adapter that is not finite are not, and need not be equal."""
    is_finite = expected.isfinite()
    difference = torch.where(is_finite, actual.float() - expected.float(), 0.0)
    norm = torch.where(is_finite, expected.float(), 0.0).norm()
    return bool(difference.norm() <= _TOLERANCE * norm)
