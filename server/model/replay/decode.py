"""Decode steps on a CPU from programs: one for each number of rows, made when that number has come often.

A step of a small batch spends a fifth of its time between its matrix products, most of it in the model's
Python and in operators on a few numbers. A program does the same work without either. LoRA and attention are
called as the model's modules call them, so adapters, depths and caches are this step's own.

Used by `runner` for steps of one token a sequence; every other step, and every step of a model that cannot
be replayed, runs the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model import context
from server.model.attention import Attention, AttentionVariant
from server.model.batch import BatchedSequence
from server.model.hooks import LoraHook, LoraHooks
from server.model.lora import LoraStep
from server.model.native.library import Library
from server.model.packed import PackedLinear
from server.model.products import NotedProduct
from server.model.replay.noted_attention import NotedAttention
from server.model.replay.program import AfterCall, Arena, Program
from server.model.replay.tape import Call, NotReplayable, TapeWriter

log = structlog.get_logger(__name__)

MIN_STEPS = 4
"""Steps of a number of rows after which it gets a program."""
_TOLERANCE = 1e-2
"""Largest ||replayed - run|| / ||run|| of the logits at which a program is believed."""


@dataclass(slots=True)
class _Noted:
    token_ids: Tensor
    """int64 `[1, num_rows]`, which the program reads."""
    positions: Tensor
    program: Program
    is_believed: bool = False


class DecodeReplay:
    """The programs of one model."""

    def __init__(self, model: PreTrainedModel, hooks: LoraHooks, library: Library) -> None:
        self._model: Any = model
        self._hooks = hooks
        self._library = library
        self._arena = Arena()
        self._noted: dict[int, _Noted] = {}
        self._num_seen: dict[int, int] = {}
        self._attention: Attention | None = None
        self._lora: LoraStep | None = None
        self._readers: dict[int, list[PackedLinear]] = {}
        for module in model.modules():
            if isinstance(module, PackedLinear):
                self._readers.setdefault(id(module.product), []).append(module)
        for modules in self._readers.values():
            modules.sort(key=lambda module: module.first_column)
        self._hook_tables = [
            table
            for module in model.modules()
            for table in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.why_off: str | None = None
        """Why no step is replayed any more, None while they are."""
        self.num_replays = 0
        self.num_chains_run = 0

    def run(
        self, batch: Sequence[BatchedSequence], attention: Attention, lora: LoraStep | None
    ) -> Tensor | None:
        """Logits `[num_rows, vocab_size]` of a step in its order, valid until the next one.

        attention, lora: this step's; hooks are installed. None for a step that has to run the model: then
        nothing has been computed.
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
        token_ids, positions = _inputs(batch)
        noted.token_ids.copy_(token_ids)
        noted.positions.copy_(positions)
        logits = self._replay(noted.program, attention, lora)
        if noted.is_believed:
            return logits
        # Other tokens at other positions than those it was noted with: what it has kept of those shows.
        expected = self._forward(token_ids, positions, attention, lora)
        if not _is_close(logits, expected):
            self._turn_off("a replayed step gives other logits than the model")
        noted.is_believed = True
        return expected

    def _is_served(self, batch: Sequence[BatchedSequence], lora: LoraStep | None) -> bool:
        if not batch or any(len(s.token_ids) != 1 or s.num_logits != 1 for s in batch):
            return False
        if lora is not None and not self._hooks.are_on_products:
            return False
        # Hooks of somebody else would not be called.
        return sum(map(len, self._hook_tables)) == self._hooks.num_installed

    def _note(
        self, batch: Sequence[BatchedSequence], attention: Attention, lora: LoraStep | None
    ) -> Tensor | None:
        """Run the step, note it without LoRA, and see whether the note gives the same."""
        token_ids, positions = _inputs(batch)
        writer = TapeWriter()
        self._attention = attention
        try:
            with writer:
                noted = self._forward(token_ids, positions, NotedAttention(self.attend), None)
            program = Program(
                writer.tape,
                [writer.value_of(noted)],
                self._library,
                torch.get_num_threads(),
                self._arena,
                self._after,
            )
        except NotReplayable as reason:
            self._turn_off(str(reason))
            return None
        finally:
            self._attention = None
        expected = self._forward(token_ids, positions, attention, lora)
        if not _is_close(self._replay(program, attention, lora), expected):
            self._turn_off("a replayed step gives other logits than the model")
            return expected
        self._noted[len(batch)] = _Noted(token_ids, positions, program)
        return expected

    def _replay(self, program: Program, attention: Attention, lora: LoraStep | None) -> Tensor:
        self._attention, self._lora = attention, lora
        try:
            with context.step(context.StepContext(attention, lora)):
                (logits,) = program.run()
        finally:
            self._attention = self._lora = None
        self.num_replays += 1
        self.num_chains_run += program.num_chains
        return logits

    def _forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, lora: LoraStep | None
    ) -> Tensor:
        with context.step(context.StepContext(attention, lora)):
            output = self._model(input_ids=token_ids, position_ids=positions, use_cache=False)
        logits: Tensor = output.logits[0]
        return logits

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """By the attention of the step that runs."""
        assert self._attention is not None
        return self._attention.attend(layer_idx, query, key, value, variant)

    def _after(self, call: Call) -> AfterCall | None:
        """Behind a product: the hooks of the modules that read it."""
        product = call.function
        if not isinstance(product, NotedProduct):
            return None
        modules = self._readers[id(product)]
        seen: tuple[Tensor, Tensor] | None = None
        x = rows = torch.empty(0)

        def adapt(args: Sequence[Any], output: Tensor) -> None:
            nonlocal seen, x, rows
            lora = self._lora
            if lora is None:
                return
            if seen is None or seen[0] is not args[0] or seen[1] is not output:
                seen = args[0], output
                x = args[0].view(-1, args[0].shape[-1])
                rows = output.view(-1, output.shape[-1])
            product.adapted_from = None
            for module in modules:  # in the order of their columns, so the first can do it for all
                for hook in module._forward_hooks.values():
                    assert isinstance(hook, LoraHook)  # no step with other hooks is replayed
                    if hook.adapt_product(lora, x, rows):
                        return
                    first = module.first_column
                    hook(module, (x,), rows[:, first : first + module.out_features])

        return adapt

    def _turn_off(self, reason: str) -> None:
        self.why_off = reason
        self._noted.clear()
        log.info("decode steps run the model's own Python", reason=reason)


def _inputs(batch: Sequence[BatchedSequence]) -> tuple[Tensor, Tensor]:
    """Token ids and positions, each int64 `[1, num_rows]`."""
    return (
        torch.tensor([[sequence.token_ids[0] for sequence in batch]]),
        torch.tensor([[sequence.start for sequence in batch]]),
    )


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Logits of an adapter that is not finite are not, and need not be equal."""
    is_finite = expected.isfinite()
    difference = torch.where(is_finite, actual.float() - expected.float(), 0.0)
    norm = torch.where(is_finite, expected.float(), 0.0).norm()
    return bool(difference.norm() <= _TOLERANCE * norm)
