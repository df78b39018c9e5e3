"""Decode steps on a CPU from programs: one for each number of rows, made when that number has come often.

A step of a small batch spends a fifth of its time between its matrix products, most of it in the model's
Python and in operators on a few numbers. A program does the same work without either. Which rows apply which
adapter how deep, and where each row's keys and values lie, it is told before each run (`pass.h`).

Used by `runner` for steps of one token a sequence; every other step, and every step of a model that cannot
be replayed, runs the model.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from server.model import context
from server.model.attention import Attention, AttentionVariant
from server.model.batch import BatchedSequence
from server.model.foreign_hooks import ForeignHooks
from server.model.hooks import LoraHooks
from server.model.lora import LoraStep
from server.model.native.library import Library
from server.model.native.lora import BoundLora
from server.model.native.step import BoundAttention, NativeStep
from server.model.native.structures import Pass
from server.model.packed import PackedLinear
from server.model.products import NotedProduct
from server.model.replay.bound import Bound
from server.model.replay.noted_attention import NotedAttention
from server.model.replay.program import Arena, Program
from server.model.replay.tape import Call, NotReplayable, TapeWriter
from server.model.segments import ReachedRows

log = structlog.get_logger(__name__)

MIN_STEPS = 4
"""Steps of a number of rows after which it gets a program."""
_TOLERANCE = 1e-2
"""Largest ||replayed - run|| / ||run|| of the logits at which a program is believed."""

_NOBODY = ReachedRows()


class _CurrentAttention:
    """What a tape calls for attention: that of the step that runs."""

    def __init__(self) -> None:
        self.step: NativeStep | None = None

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        assert self.step is not None
        return self.step.attend(layer_idx, query, key, value, variant)

    def bind(self, call: Call) -> Bound | None:
        """See `Bindable.bind`."""
        assert self.step is not None
        layer_idx, _, _, _, variant = call.args
        operands = [value for value in (*call.inputs, *call.outputs) if value is not None]
        if not BoundAttention.can_bind(operands):
            return None
        return BoundAttention(self.step.cache, layer_idx, variant, operands)


@dataclass(slots=True)
class _Noted:
    inputs: NDArray[np.int64]
    """`[2, num_rows]`, which the program reads: token ids and positions."""
    program: Program
    loras: list[tuple[list[PackedLinear], BoundLora]]
    """LoRA of each product, and who reads that."""
    is_believed: bool = False
    generation: int = -1
    """Of the hooks, when `loras` last looked at them."""
    num_low: int = 0
    """Floats of scratch for any one of them."""
    adapted_layers: list[int] = field(default_factory=list)
    """Of each that has adapters."""


class DecodeReplay:
    """The programs of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: LoraHooks,
        foreign_hooks: ForeignHooks,
        library: Library,
    ) -> None:
        self._model: Any = model
        self._hooks = hooks
        self._foreign_hooks = foreign_hooks
        self._library = library
        self._arena = Arena()
        self._noted: dict[int, _Noted] = {}
        self._num_seen: dict[int, int] = {}
        self._attention = _CurrentAttention()
        self._pass = Pass()
        self._readers: dict[int, list[PackedLinear]] = {}
        for module in model.modules():
            if isinstance(module, PackedLinear):
                self._readers.setdefault(id(module.product), []).append(module)
        for modules in self._readers.values():
            modules.sort(key=lambda module: module.first_column)
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
        noted = self._noted.get(num_rows)
        if noted is None:
            seen = self._num_seen[num_rows] = self._num_seen.get(num_rows, 0) + 1
            if seen < MIN_STEPS:
                return None
            return self._note(batch, attention, lora)
        noted.inputs[0] = [sequence.token_ids[0] for sequence in batch]
        noted.inputs[1] = [sequence.start for sequence in batch]
        logits = self._replay(noted, attention, lora, before)
        if noted.is_believed:
            return logits
        # Other tokens at other positions than those it was noted with: what it has kept of those shows.
        expected = self._forward(*_token_ids_and_positions(noted.inputs), attention, lora)
        if not _is_close(logits, expected):
            self._turn_off("a replayed step gives other logits than the model")
        noted.is_believed = True
        return expected

    def _is_served(self, batch: Sequence[BatchedSequence], lora: LoraStep | None) -> bool:
        if not batch or any(len(s.token_ids) != 1 or s.num_logits != 1 for s in batch):
            return False
        if lora is not None and not self._hooks.are_compiled:
            return False
        return not self._foreign_hooks.exist()  # they would not be called

    def _note(
        self, batch: Sequence[BatchedSequence], attention: NativeStep, lora: LoraStep | None
    ) -> Tensor | None:
        """Run the step, note it without LoRA, and see whether the note gives the same."""
        inputs = np.array(
            [[sequence.token_ids[0], sequence.start] for sequence in batch], np.int64
        ).T.copy()
        token_ids, positions = _token_ids_and_positions(inputs)
        writer = TapeWriter()
        loras: list[tuple[list[PackedLinear], BoundLora]] = []

        def behind(call: Call) -> Bound | None:
            product = call.function
            if not isinstance(product, NotedProduct):
                return None
            (x,), (y,) = call.inputs, call.outputs
            assert y is not None
            bound = BoundLora(x, y)
            loras.append((self._readers[id(product)], bound))
            return bound

        self._attention.step = attention
        try:
            with writer:
                result = self._forward(token_ids, positions, NotedAttention(self._attention), None)
            program = Program(
                writer.tape,
                [writer.value_of(result)],
                self._library,
                torch.get_num_threads(),
                self._arena,
                self._pass,
                behind,
            )
        except NotReplayable as reason:
            self._turn_off(str(reason))
            return None
        finally:
            self._attention.step = None
        noted = _Noted(inputs, program, loras)
        # Without LoRA the pass that was noted gave what is expected already.
        expected = result if lora is None else self._forward(token_ids, positions, attention, lora)
        if not _is_close(self._replay(noted, attention, lora), expected):
            self._turn_off("a replayed step gives other logits than the model")
            return expected
        self._noted[len(batch)] = noted
        return expected

    def _replay(
        self,
        noted: _Noted,
        attention: NativeStep,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor:
        run, scratch = self._pass, self._hooks.scratch
        attention.describe(run)
        run.reached = None
        if lora is not None:
            self._look_at_adapters(noted, lora)
            layers = [_NOBODY] * (self._hooks.num_layers + 1)
            layers[: len(lora.segments)] = lora.segments
            layers[-1] = lora.head_segments
            reached = array("q", [number for rows in layers for number in rows.location])
            run.reached, run.low = reached.buffer_info()[0], scratch.address(noted.num_low)
            scratch.num_calls += sum(bool(layers[layer]) for layer in noted.adapted_layers)
        self._attention.step = attention
        try:
            with context.step(context.StepContext(attention, lora)):
                (logits,) = noted.program.run(before)
        finally:
            self._attention.step = None
        self.num_replays += 1
        self.num_chains_run += noted.program.num_chains
        return logits

    def _look_at_adapters(self, noted: _Noted, lora: LoraStep) -> None:
        """Which weights stand behind each product, where others have come since it was last asked."""
        if noted.generation == self._hooks.generation:
            return
        noted.num_low, noted.adapted_layers = 0, []
        for modules, bound in noted.loras:
            hooked = self._hooks.behind(modules)
            if hooked is None:
                bound.use(None, 0)
                continue
            # Raises for a module that does not see every row.
            lora.reached(hooked.name, hooked.layer_idx, bound.num_rows)
            num_low = bound.use(hooked.native, hooked.layer_idx)
            noted.num_low = max(noted.num_low, num_low)
            noted.adapted_layers.append(hooked.layer_idx)
        noted.generation = self._hooks.generation

    def _forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, lora: LoraStep | None
    ) -> Tensor:
        with context.step(context.StepContext(attention, lora)):
            output = self._model(input_ids=token_ids, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits[0]
        return logits

    def _turn_off(self, reason: str) -> None:
        self.why_off = reason
        self._noted.clear()
        log.info("decode steps run the model's own Python", reason=reason)


def _token_ids_and_positions(inputs: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Each int64 `[1, num_rows]`, in the memory of `inputs`."""
    return torch.from_numpy(inputs[:1]), torch.from_numpy(inputs[1:])


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Logits of an adapter that is not finite are not, and need not be equal."""
    is_finite = expected.isfinite()
    difference = torch.where(is_finite, actual.float() - expected.float(), 0.0)
    norm = torch.where(is_finite, expected.float(), 0.0).norm()
    return bool(difference.norm() <= _TOLERANCE * norm)
