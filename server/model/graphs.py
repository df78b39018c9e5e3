"""Decode steps recorded once and run again: on a GPU as CUDA graphs, which need no Python to run.

A decode step of a large model launches a thousand small kernels, which Python cannot do as fast as a
GPU runs them. A recording is for so many rows, up to a depth, over so many blocks of history, each
rounded up to one of few sizes; the rest is read from memory when it runs (`decode`, `gathered`), so
adapters and depths that nobody had loaded when it was made are as right as those that were there.

Where the step can be noted as a tape (`replay`), its elementwise operators are recorded as one kernel a
chain, not as the model's code has them.

What a recording cannot follow is which modules have hooks and where their stacks lie:
`GatheredSlots.signature` tells, and a recording whose signature is no more is made anew.

Used by `runner` for steps of one token a sequence; all others, and all of a model that cannot be
recorded, run as they always did.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.model import context
from server.model.attention import Attention, AttentionVariant
from server.model.batch import BatchedSequence
from server.model.decode import DecodeInputs, Fed
from server.model.gathered import GatheredSlots
from server.model.gathered_step import GatheredStep, fetch_of, is_beside
from server.model.hooks import LoraHooks
from server.model.recorder import Recorder, Recording
from server.model.replay.lowered import BindChain, LoweredStep
from server.model.replay.noted_attention import NotedAttention
from server.model.replay.tape import TapeWriter
from server.model.tolerance import LOGITS_TOLERANCE

log = structlog.get_logger(__name__)

MAX_RECORDINGS = 64
"""The least recently used goes first. One holds some megabytes of a driver's memory."""
_MIN_BLOCKS = 4
_DEPTH_PARTS = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a recording is for: steps of at most this many rows, this depth, blocks of history."""

    num_rows: int
    depth: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class _Recorded:
    recording: Recording
    signature: tuple[tuple[str, int], ...]


class DecodeGraphs:
    """The recordings of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: LoraHooks,
        slots: GatheredSlots,
        inputs: DecodeInputs,
        recorder: Recorder,
        num_layers: int,
        bind: BindChain | None = None,
    ) -> None:
        """bind: makes the kernels of a noted step's chains; None where steps are recorded unnoted."""
        self._model: Any = model
        self._hooks = hooks
        self._slots = slots
        self._inputs = inputs
        self._recorder = recorder
        self._num_layers = num_layers
        self._bind = bind
        self._attention: Attention | None = None
        self._recorded: OrderedDict[Bucket, _Recorded] = OrderedDict()
        self._generation = slots.generation
        self._logits: Tensor | None = None
        self.why_off: str | None = None
        """Why no step is recorded any more, None while they are."""
        self.why_plain: str | None = None
        """Why steps are recorded by the model's own code although chains have kernels; None while not."""
        self.num_replays = 0

    @property
    def buckets(self) -> list[Bucket]:
        """What there are recordings for, least recently used first."""
        return list(self._recorded)

    def run(self, batch: Sequence[BatchedSequence], fed: Fed | None = None) -> Tensor | None:
        """Logits of a step in its order, `[num_rows, vocab_size]`, valid until the next step.

        fed: its tokens, where they are on the device already.

        None for a step that is not one token and one row of logits a sequence or that is too large,
        and for every step once a recording has failed: then nothing has been computed.
        """
        bucket = None if self.why_off is not None else self._bucket(batch)
        if bucket is None:
            return None
        self._drop_outdated()
        self._inputs.fill(batch, bucket.num_rows, fed)
        recorded = self._recorded.get(bucket)
        if recorded is None:
            recorded = self._record(bucket, len(batch))
            if recorded is None:
                return None
        self._recorded.move_to_end(bucket)
        recorded.recording.replay()
        self.num_replays += 1
        assert self._logits is not None
        return self._logits[: len(batch)]

    def clear(self) -> None:
        """Let go of all recordings."""
        self._let_go(list(self._recorded))

    def _let_go(self, buckets: list[Bucket]) -> None:
        if buckets:
            self._recorder.settle()
        for bucket in buckets:
            del self._recorded[bucket]

    def _bucket(self, batch: Sequence[BatchedSequence]) -> Bucket | None:
        if not batch or any(len(s.token_ids) != 1 or s.num_logits != 1 for s in batch):
            return None
        if any(s.slot >= self._slots.num_slots for s in batch):
            return None
        size = self._inputs.cache.block_size
        num_rows = row_bucket(len(batch))
        num_blocks = max(s.start for s in batch) // size + 1
        if num_rows > self._inputs.max_rows or num_blocks > self._inputs.max_blocks:
            return None
        return Bucket(
            num_rows=num_rows,
            depth=depth_bucket(max(s.depth for s in batch), self._num_layers),
            num_blocks=min(block_bucket(num_blocks), self._inputs.max_blocks),
        )

    def _drop_outdated(self) -> None:
        if self._generation == self._slots.generation:
            return
        self._generation = self._slots.generation
        signatures: dict[int, tuple[tuple[str, int], ...]] = {}
        outdated = []
        for bucket, recorded in self._recorded.items():
            if bucket.depth not in signatures:
                signatures[bucket.depth] = self._slots.signature(bucket.depth)
            if recorded.signature != signatures[bucket.depth]:
                outdated.append(bucket)
        self._let_go(outdated)

    def _record(self, bucket: Bucket, num_own: int) -> _Recorded | None:
        """Run the step, record it, and believe the recording if it gives the same."""
        self._hooks.install(bucket.depth)
        # What the model itself raises here is this step's failure, as it would be without recording.
        self._recorder.warm_up(lambda: self._forward(bucket))
        assert self._logits is not None
        expected = self._logits[:num_own].clone()
        recording = self._record_lowered(bucket, expected) if self._bind is not None else None
        if recording is None:
            try:
                recording = self._replayed(lambda: self._forward(bucket))
            except Exception as failure:  # noqa: BLE001 -- whatever cannot be recorded runs without
                self._turn_off(f"a step cannot be recorded: {failure!r}")
                return None
            error = _error(self._logits[:num_own], expected)
            if not error <= LOGITS_TOLERANCE[expected.dtype]:
                self._turn_off(f"a recorded step gives other logits than itself, by {error:.1e}")
                return None
        if len(self._recorded) >= MAX_RECORDINGS:
            self._let_go([next(iter(self._recorded))])
        recorded = _Recorded(recording, self._slots.signature(bucket.depth))
        self._recorded[bucket] = recorded
        return recorded

    def _record_lowered(self, bucket: Bucket, expected: Tensor) -> Recording | None:
        """A recording of the step's tape; None where it gives something else, or there can be none."""
        try:
            step = self._note(bucket)
            self._recorder.warm_up(lambda: self._run_lowered(step, bucket))
            recording = self._replayed(lambda: self._run_lowered(step, bucket))
        except Exception as failure:  # noqa: BLE001 -- the model's own code can still be recorded
            self._record_plainly(repr(failure))
            return None
        assert self._logits is not None
        error = _error(self._logits[: len(expected)], expected)
        if not error <= LOGITS_TOLERANCE[expected.dtype]:
            self._record_plainly(f"its chains give other logits than the model, by {error:.1e}")
            return None
        return recording

    def _note(self, bucket: Bucket) -> LoweredStep:
        assert self._bind is not None
        self._attention = self._inputs.attention(bucket.num_rows, bucket.num_blocks)
        writer = TapeWriter()
        with writer:
            logits = self._logits_of(bucket, NotedAttention(self._attend))
        return LoweredStep(
            writer.tape, writer.value_of(logits), self._bind, logits.device, is_beside, fetch_of
        )

    def _run_lowered(self, step: LoweredStep, bucket: Bucket) -> None:
        self._attention = self._inputs.attention(bucket.num_rows, bucket.num_blocks)
        self._keep(step.run(self._recorder.fork), bucket)
        self._attention = None

    def _attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, variant: AttentionVariant
    ) -> Tensor:
        """By the attention of the run: what one keeps from layer to layer is part of a recording."""
        assert self._attention is not None
        return self._attention.attend(layer_idx, query, key, value, variant)

    def _replayed(self, step: Callable[[], None]) -> Recording:
        recording = self._recorder.record(step)
        recording.replay()
        return recording

    def _record_plainly(self, reason: str) -> None:
        self._bind = None
        self.why_plain = reason
        log.warning("decode steps are recorded without chains", reason=reason)

    def _turn_off(self, reason: str) -> None:
        self.why_off = reason
        self.clear()
        log.warning("decode steps run without graphs", reason=reason)

    def _forward(self, bucket: Bucket) -> None:
        """One step over the inputs, its logits copied to where they stay."""
        attention = self._inputs.attention(bucket.num_rows, bucket.num_blocks)
        self._keep(self._logits_of(bucket, attention), bucket)

    def _logits_of(self, bucket: Bucket, attention: Attention) -> Tensor:
        num_rows = bucket.num_rows
        lora = None
        if bucket.depth:
            lora = GatheredStep(self._slots, self._inputs.adapters(num_rows), self._num_layers)
        with context.step(context.StepContext(attention, lora)):
            output = self._model(
                input_ids=self._inputs.token_ids(num_rows),
                position_ids=self._inputs.positions(num_rows),
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _keep(self, logits: Tensor, bucket: Bucket) -> None:
        if self._logits is None:
            self._logits = logits.new_empty(self._inputs.max_rows, logits.shape[1])
        self._logits[: bucket.num_rows].copy_(logits)


def row_bucket(num_rows: int) -> int:
    """A power of two up to 8, then a multiple of 8: less than 8 rows more than there are."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def depth_bucket(depth: int, num_layers: int) -> int:
    """0, or so many quarters of the layers."""
    part = -(-depth * _DEPTH_PARTS // num_layers)
    return -(-part * num_layers // _DEPTH_PARTS)


def block_bucket(num_blocks: int) -> int:
    """A power of two, for histories grow a block at a time."""
    return max(_MIN_BLOCKS, 1 << (num_blocks - 1).bit_length())


def _error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||. Waits for the device.

    Logits of an adapter that is not finite are not, and need not be equal.
    """
    is_finite = expected.isfinite()
    difference = torch.where(is_finite, actual.float() - expected.float(), 0.0).norm()
    norm = torch.where(is_finite, expected.float(), 0.0).norm()
    return float(difference / norm) if bool(norm) else float(difference)
