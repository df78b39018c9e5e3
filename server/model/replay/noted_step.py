"""Steps noted as programs: of one number of decode rows, or of any, and then mostly of prompts' rows, too.

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
from server.model.batch import PackedRows
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import LoraStep, sees_others
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
from server.model.replay.prompt_rows import PromptRows, prompt_rows
from server.model.replay.row_counts import Counts, NotByRows, RowCounts, row_counts
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
    num_noted: int
    """Decode rows that it was noted with; of a prompt's as many can be wanted at most."""
    max_rows: int
    """With a prompt's; 0 where it does not run them."""
    _attention: CurrentAttention
    _pass: Pass
    _loras: _Loras
    _counts: RowCounts | None
    """None where it only runs with `num_noted`."""
    checked: list[tuple[int, bool]] = field(default_factory=list)
    """Of the steps that the model computed too: the number of rows, and whether they were decode rows."""
    _generation: int = -1
    """Of the hooks, when `_loras` last looked at them."""
    _num_low: int = 0
    """Floats of scratch that a row takes for any one of them."""
    _adapted_layers: list[int] = field(default_factory=list)
    """Of each that has adapters."""

    def takes(self, rows: PackedRows) -> bool:
        """Whether it runs a step of these rows."""
        num_rows, num_wanted = len(rows.token_ids), len(rows.wanted)
        if not rows.are_decodes:
            return num_rows <= self.max_rows and num_wanted <= self.num_noted
        if self._counts is None:
            return num_rows == self.num_noted
        return num_rows <= self.num_noted

    def has_to_be_checked(self, rows: PackedRows) -> bool:
        """Whether the model should compute such a step too.

        The first two, as other tokens at other positions show what was kept of those before, and the first
        with another number of rows; of decode steps and of others.
        """
        numbers = [
            number for number, are_decodes in self.checked if are_decodes == rows.are_decodes
        ]
        if len(numbers) < 2:
            return True
        is_another = len(rows.token_ids) not in numbers
        return self._counts is not None and len(set(numbers)) == 1 and is_another

    def was_checked(self, rows: PackedRows) -> None:
        """The model gave the same."""
        self.checked.append((len(rows.token_ids), rows.are_decodes))

    def run(
        self,
        rows: PackedRows,
        attention: NativeStep,
        hooks: LoraHooks,
        lora: LoraStep | None,
        before: Callable[[], None] | None = None,
    ) -> Tensor:
        """Logits `[len(rows.wanted), vocab_size]`, valid until any program of the model runs.

        See `StepReplay.run`.
        """
        num_rows, num_wanted = len(rows.token_ids), len(rows.wanted)
        self.inputs[:, :num_rows] = rows.token_ids, rows.positions
        if self._counts is not None:
            self._counts.set(num_rows, num_wanted)
        run = self._pass
        spans, wanted = attention.describe(run), array("q", rows.wanted)
        run.wanted = None if num_wanted == num_rows else wanted.buffer_info()[0]
        run.num_wanted = num_wanted
        run.reached = None
        if lora is not None:
            self._look_at_adapters(hooks)
            layers = self._reached(lora, hooks.num_layers, rows)
            reached = array("q", [number for layer in layers for number in layer.location])
            run.reached = reached.buffer_info()[0]
            run.low = hooks.scratch.address(num_rows * self._num_low)
            hooks.scratch.num_calls += sum(bool(layers[layer]) for layer in self._adapted_layers)
        self._attention.step = attention
        try:
            with context.step(context.StepContext(attention, lora)):
                (logits,) = self.program.run(before)
        finally:
            self._attention.step = None
        del spans  # the kernels have read them
        return logits[:num_wanted]

    def _look_at_adapters(self, hooks: LoraHooks) -> None:
        """Which weights stand behind each product, where others have come since it was last asked.

        Raises ModelError for a module that does not see every row.
        """
        if self._generation == hooks.generation:
            return
        self._num_low, self._adapted_layers = 0, []
        for modules, bound in self._loras:
            hooked = hooks.behind(modules)
            if hooked is None:
                bound.use(None, 0)
                continue
            if bound.num_rows != self.num_noted:
                raise sees_others(hooked.name, bound.num_rows, self.num_noted)
            layer = hooked.layer_idx
            if bound.is_behind and layer < hooks.num_layers:
                layer += hooks.num_layers + 1
            self._num_low = max(self._num_low, bound.use(hooked.native, layer))
            self._adapted_layers.append(layer)
        self._generation = hooks.generation

    def _reached(self, lora: LoraStep, num_layers: int, rows: PackedRows) -> list[ReachedRows]:
        """By layer, lm_head's behind them; then those of the layers again among the wanted rows."""
        layers = [_NOBODY] * (2 * num_layers + 1)
        layers[: len(lora.segments)] = lora.segments
        layers[num_layers] = lora.head_segments
        for index in self._adapted_layers:
            if index > num_layers:
                own = layers[index - num_layers - 1]
                is_whole = len(rows.wanted) == len(rows.token_ids)
                layers[index] = own if is_whole else own.among(rows.wanted)
        return layers


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
        self.arena = Arena()
        self._pass = Pass()
        self._readers: dict[int, list[PackedLinear]] = {}
        for module in model.modules():
            if isinstance(module, PackedLinear):
                self._readers.setdefault(id(module.product), []).append(module)
        for modules in self._readers.values():
            modules.sort(key=lambda module: module.first_column)

    def exactly(self, num_rows: int) -> NotedStep:
        """Of so many decode rows. Raises NotReplayable."""
        inputs = np.zeros((2, num_rows), np.int64)
        return self._noted(inputs, num_rows, self._outline(inputs, num_rows))

    def up_to(self, num_rows: int, max_rows: int) -> NotedStep | None:
        """Of any number of decode rows to `num_rows`, and where that can be of any rows to `max_rows`; None
        where the model's steps are not of that kind. Raises NotReplayable.
        """
        inputs = np.zeros((2, max(num_rows, max_rows) + 1), np.int64)
        own, larger = (self._outline(inputs, num_rows + more) for more in range(2))
        steps = own.steps, larger.steps
        try:
            counts = row_counts((own.tape, larger.tape), steps, num_rows)
        except NotByRows as reason:
            log.debug("decode steps are noted for each number of rows", reason=str(reason))
            return None
        prompts = prompt_rows(steps, own.tape.given, [own.logits], num_rows, max_rows)
        return self._noted(inputs, num_rows, own, counts, prompts)

    def forward(
        self,
        inputs: NDArray[np.int64],
        num_rows: int,
        attention: Attention,
        lora: LoraStep | None,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """What the model itself gives for the first rows of the inputs: logits `[num_wanted, vocab_size]`,
        of all of them unless `wanted` says of which.
        """
        kept = 0 if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        with context.step(context.StepContext(attention, lora)):
            # Views of all there are, so that a tape knows how many.
            rows = torch.from_numpy(inputs)[:, :num_rows]
            output = self._model(
                input_ids=rows[:1],
                position_ids=rows[1:],
                use_cache=False,
                logits_to_keep=kept,
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
        num_rows: int,
        outline: _Outline,
        counts: Sequence[Counts] | None = None,
        prompts: PromptRows | None = None,
    ) -> NotedStep:
        steps, room, row_counts = outline.steps, {}, None
        if prompts is not None:
            for step in steps[prompts.behind :]:
                if isinstance(step, BoundLora):
                    step.is_behind = True
            steps, room = prompts.among(steps), prompts.room
        if counts is not None:
            row_counts = RowCounts(counts, num_rows, None if prompts is None else prompts.behind)
        program = Program(
            steps,
            outline.tape.given,
            [outline.logits],
            self._library,
            torch.get_num_threads(),
            self.arena,
            self._pass,
            room,
        )
        return NotedStep(
            inputs,
            program,
            num_rows,
            0 if prompts is None else prompts.max_rows,
            self._attention,
            self._pass,
            outline.loras,
            row_counts,
        )
