"""LoRA by row for a sweep, through the server's own hooks: `boundary.rows.LoraRows` of a served adapter.

A sweep runs on the model that serves, between two steps. Inside `with rows` attention is dense and
the hooks apply one adapter to the first rows of each layer; outside of it the model is the engine's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from torch import Tensor

from server.errors import ModelError
from server.model import context
from server.model.checkpoint import LoraCheckpoint
from server.model.dense import DenseAttention
from server.model.runner import ModelRunner
from server.model.segments import ReachedRows, Segment


class CalibrationRows:
    """One adapter on a runner's model; made by `calibration_rows`, on the engine's thread."""

    def __init__(self, runner: ModelRunner, checkpoint: LoraCheckpoint, slot: int) -> None:
        self._runner = runner
        self._slot = slot
        self._num_layers = runner.targets.num_layers
        self._layers = frozenset(self._layer_of(idx) for idx in checkpoint.layers.values())
        self._rows: dict[int, tuple[int, int]] = {}
        self._callback: Callable[[int, Tensor], None] | None = None
        self._stack = ExitStack()

    @property
    def layers(self) -> frozenset[int]:
        """The layers that have LoRA."""
        return self._layers

    def __enter__(self) -> "CalibrationRows":
        with ExitStack() as stack:
            self._runner.hooks.install(self._num_layers)
            stack.callback(self._runner.hooks.install, 0)
            attention = DenseAttention(lambda layer_idx: self._rows[layer_idx][1])
            stack.enter_context(context.step(context.StepContext(attention, self)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._rows.clear()
        self._stack.close()

    def reach(self, layer_idx: int, num_lora_rows: int, num_rows: int) -> None:
        """Say that the first `num_lora_rows` of `num_rows` apply LoRA in this layer."""
        self._rows[layer_idx] = num_lora_rows, num_rows

    def observe(self, callback: Callable[[int, Tensor], None] | None) -> None:
        """From now on `callback(layer_idx, added)` sees what LoRA adds to a module's output.

        added `[num_lora_rows * row_len, out_features]`. None ends it.
        """
        self._callback = callback

    @property
    def is_observed(self) -> bool:
        """See `lora.LoraPlan`."""
        return self._callback is not None

    def reached(self, name: str, layer_idx: int, num_rows: int) -> ReachedRows:
        """See `lora.LoraPlan`. There, a row is a token."""
        num_lora_rows, rows = self._rows[self._layer_of(layer_idx)]
        if num_rows % rows:
            raise ModelError(
                f"{name} was called with {num_rows} tokens, which are not {rows} rows: "
                "a module that does not see every token cannot carry an adapter by rows"
            )
        num_reached = num_rows // rows * num_lora_rows
        return ReachedRows([Segment(self._slot, 0, num_reached)] if num_reached else [])

    def added(self, layer_idx: int, before: Tensor, after: Tensor) -> None:
        """See `lora.LoraPlan`."""
        layer = self._layer_of(layer_idx)
        num_lora_rows, rows = self._rows[layer]
        end = len(after) // rows * num_lora_rows
        if self._callback is not None and end:
            self._callback(layer, (after - before)[:end])

    def _layer_of(self, layer_idx: int) -> int:
        """LoRA of the embedding goes with the first layer, that of the head with the last."""
        return min(max(layer_idx, 0), self._num_layers - 1)


@contextmanager
def calibration_rows(runner: ModelRunner, checkpoint: LoraCheckpoint) -> Iterator[CalibrationRows]:
    """Lend an adapter a slot of its own for as long as the block lasts."""
    slot = runner.slots.lend(checkpoint)
    try:
        yield CalibrationRows(runner, checkpoint, slot)
    finally:
        runner.slots.take_back(slot)
