"""Decode steps noted as programs: of one number of rows, or of any up to one.

A pass is noted in outline, without its products and attention, so that it takes hardly longer for many rows
than for few.
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
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import LoraStep
from server.model.native.library import Library
from server.model.native.lora import BoundLora
from server.model.native.step import BoundAttention, NativeStep
from server.model.native.structures import Pass
from server.model.packed import PackedLinear
from server.model.products import NotedProduct
from server.model.replay.bound import Bound
from server.model.replay.bound_steps import bound_steps
from server.model.replay.noted_attention import NotedAttention
from server.model.replay.program import Arena, Program
from server.model.replay.row_counts import NotByRows, RowCounts, row_counts
from server.model.replay.tape import Call, Tape, TapeWriter, Value
from server.model.segments import ReachedRows

log = structlog.get_logger(__name__)

_NOBODY = ReachedRows()

_Loras = list[tuple[list[PackedLinear], BoundLora]]
"""LoRA behind each product, and who reads that."""


class CurrentAttention:
    """What a tape calls for attention: that of the step that runs."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.step: NativeStep | None = None

    def __call__(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Attention.attend`."""
        assert self.step is not None
        return self.step.attend(layer_idx, query, key, value, variant)

    def outline(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """See `Outlined.outline`."""
        return query.new_zeros(*query.shape[:2], value.shape[2])

    def bind(self, call: Call) -> Bound | None:
        """See `Bindable.bind`."""
        layer_idx, _, _, _, variant = call.args
        operands = [value for value in (*call.inputs, *call.outputs) if value is not None]
        if not BoundAttention.can_bind(operands):
            return None
        return BoundAttention(self._cache, layer_idx, variant, operands)


@dataclass(slots=True)
class NotedStep:
    """One program, and what it has to be told of a step."""

    inputs: NDArray[np.int64]
    """`[2, at least max_rows]`, which the program reads: token ids and positions."""
    program: Program
    max_rows: int
    _attention: CurrentAttention
    _pass: Pass
    _loras: _Loras
    _counts: RowCounts | None
    """None where it only runs with `max_rows`."""
    checked: list[int] = field(default_factory=list)
    """The numbers of rows of the steps that the model computed too."""
    _generation: int = -1
    """Of the hooks, when `_loras` last looked at them."""
    _num_low: int = 0
    """Floats of scratch for any one of them."""
    _adapted_layers: list[int] = field(default_factory=list)
    """Of each that has adapters."""

    def has_to_be_checked(self, num_rows: int) -> bool:
        """Whether the model should compute a step of so many rows too.

        The first two, as other tokens at other positions show what was kept of those before, and the first
        with another number of rows.
        """
        if len(self.checked) < 2:
            return True
        numbers = set(self.checked)
        return self._counts is not None and len(numbers) == 1 and num_rows not in numbers

    def run(
        self,
        batch: Sequence[BatchedSequence],
        attention: NativeStep,
        hooks: LoraHooks,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor:
        """Logits `[len(batch), vocab_size]`, valid until any program of the model runs.

        See `DecodeReplay.run`.
        """
        num_rows = len(batch)
        self.inputs[0, :num_rows] = [sequence.token_ids[0] for sequence in batch]
        self.inputs[1, :num_rows] = [sequence.start for sequence in batch]
        if self._counts is not None:
            self._counts.set(num_rows)
        run = self._pass
        attention.describe(run)
        run.reached = None
        if lora is not None:
            self._look_at_adapters(hooks, lora, num_rows)
            layers = [_NOBODY] * (hooks.num_layers + 1)
            layers[: len(lora.segments)] = lora.segments
            layers[-1] = lora.head_segments
            reached = array("q", [number for rows in layers for number in rows.location])
            run.reached = reached.buffer_info()[0]
            run.low = hooks.scratch.address(self._num_low)
            hooks.scratch.num_calls += sum(bool(layers[layer]) for layer in self._adapted_layers)
        self._attention.step = attention
        try:
            with context.step(context.StepContext(attention, lora)):
                (logits,) = self.program.run(before)
        finally:
            self._attention.step = None
        return logits[:num_rows]

    def _look_at_adapters(self, hooks: LoraHooks, lora: LoraStep, num_rows: int) -> None:
        """Which weights stand behind each product, where others have come since it was last asked."""
        if self._generation == hooks.generation:
            return
        self._num_low, self._adapted_layers = 0, []
        for modules, bound in self._loras:
            hooked = hooks.behind(modules)
            if hooked is None:
                bound.use(None, 0)
                continue
            # Raises for a module that does not see every row.
            seen = bound.num_rows if bound.num_rows != self.max_rows else num_rows
            lora.reached(hooked.name, hooked.layer_idx, seen)
            num_low = bound.use(hooked.native, hooked.layer_idx)
            self._num_low = max(self._num_low, num_low)
            self._adapted_layers.append(hooked.layer_idx)
        self._generation = hooks.generation


@dataclass(frozen=True, slots=True)
class _Outline:
    """A noted pass, and what became of it."""

    tape: Tape
    logits: Value
    steps: list[Call | Bound]
    loras: _Loras


class StepNoter:
    """Notes the steps of one model."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, library: Library) -> None:
        self._model: Any = model
        self._library = library
        self._attention = CurrentAttention(cache)
        self._arena = Arena()
        self._pass = Pass()
        self._readers: dict[int, list[PackedLinear]] = {}
        for module in model.modules():
            if isinstance(module, PackedLinear):
                self._readers.setdefault(id(module.product), []).append(module)
        for modules in self._readers.values():
            modules.sort(key=lambda module: module.first_column)

    def exactly(self, num_rows: int) -> NotedStep:
        """Of so many rows. Raises NotReplayable."""
        inputs = np.zeros((2, num_rows), np.int64)
        return self._noted(inputs, num_rows, self._outline(inputs, num_rows), None)

    def up_to(self, max_rows: int) -> NotedStep | None:
        """Of any number of rows to `max_rows`; None where the model's steps are not of that kind. Raises
        NotReplayable.
        """
        inputs = np.zeros((2, max_rows + 1), np.int64)
        own, larger = (self._outline(inputs, max_rows + more) for more in range(2))
        try:
            counts = row_counts((own.tape, larger.tape), (own.steps, larger.steps), max_rows)
        except NotByRows as reason:
            log.debug("decode steps are noted for each number of rows", reason=str(reason))
            return None
        return self._noted(inputs, max_rows, own, counts)

    def forward(
        self, inputs: NDArray[np.int64], num_rows: int, attention: Attention, lora: LoraStep | None
    ) -> Tensor:
        """What the model itself gives for the first rows of the inputs: logits `[num_rows, vocab_size]`."""
        with context.step(context.StepContext(attention, lora)):
            output = self._model(
                input_ids=torch.from_numpy(inputs[:1, :num_rows]),
                position_ids=torch.from_numpy(inputs[1:, :num_rows]),
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _outline(self, inputs: NDArray[np.int64], num_rows: int) -> _Outline:
        writer = TapeWriter(is_outline=True)
        with writer:
            result = self.forward(inputs, num_rows, NotedAttention(self._attention), None)
        logits = writer.value_of(result)
        loras: _Loras = []

        def behind(call: Call) -> Bound | None:
            product = call.function
            if not isinstance(product, NotedProduct):
                return None
            (x,), (y,) = call.inputs, call.outputs
            assert y is not None
            bound = BoundLora(x, y)
            loras.append((self._readers[id(product)], bound))
            return bound

        steps = bound_steps(writer.tape, [logits], behind)
        return _Outline(writer.tape, logits, steps, loras)

    def _noted(
        self,
        inputs: NDArray[np.int64],
        max_rows: int,
        outline: _Outline,
        counts: RowCounts | None,
    ) -> NotedStep:
        program = Program(
            outline.steps,
            outline.tape.given,
            [outline.logits],
            self._library,
            torch.get_num_threads(),
            self._arena,
            self._pass,
        )
        return NotedStep(
            inputs, program, max_rows, self._attention, self._pass, outline.loras, counts
        )
