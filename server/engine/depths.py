"""How deep a request's adapter reaches: what it asked for, what was calibrated, or all of it."""

from collections.abc import Mapping
from typing import Literal

from server.engine.request import AdapterRef, CalibratedDepth, LoraSelection
from server.errors import BadRequest

Depth = int | Literal["auto", "full"]


class Depths:
    """The calibrated depths, and what a request's own word for one comes to. Any thread may ask."""

    def __init__(self, num_layers: int, default: Literal["auto", "full"]) -> None:
        self._num_layers = num_layers
        self._default = default
        self._calibrated: Mapping[str, CalibratedDepth | None] = {}

    def resolve(self, adapter: AdapterRef | None, depth: Depth | None) -> LoraSelection:
        """The selection for an adapter (None: the base model) that is at hand.

        Raises BadRequest for a depth out of range.
        """
        num_layers = self._num_layers
        if adapter is None:
            if depth not in (None, 0, "auto"):
                raise BadRequest(
                    f"lora_depth must be 0 on the base model, which has no adapter; got {depth!r}",
                    param="lora_depth",
                )
            return LoraSelection(None, 0, num_layers, "base")
        if depth is None:
            depth = self._default
        if depth == "auto" and (calibrated := self.calibrated(adapter)) is not None:
            return LoraSelection(
                adapter, calibrated.depth, num_layers, "calibrated", calibrated.version
            )
        if isinstance(depth, str):
            return LoraSelection(adapter, num_layers, num_layers, "full")
        if not 0 <= depth <= num_layers:
            raise BadRequest(
                f"lora_depth must be from 0 to {num_layers} (the model's layers); got {depth}",
                param="lora_depth",
            )
        return LoraSelection(adapter, depth, num_layers, "request")

    def calibrated(self, adapter: AdapterRef) -> CalibratedDepth | None:
        """What `auto` means for this content: what was set, else what lies beside its weights."""
        if adapter.digest is None:
            return None  # nobody knows its content yet
        calibrated = self._calibrated  # one look: it is replaced whole, by another thread
        if adapter.digest in calibrated:
            return calibrated[adapter.digest]
        if adapter.boundary is None:
            return None
        beside = adapter.boundary
        return CalibratedDepth(beside.depth, None, beside.created_at.timestamp())

    def usual(self, adapter: AdapterRef) -> int:
        """The depth of most requests for it: the calibrated one, or the whole adapter."""
        calibrated = self.calibrated(adapter)
        return adapter.max_depth if calibrated is None else calibrated.depth

    def set_calibrated(self, depths: Mapping[str, CalibratedDepth | None]) -> None:
        """By digest, for new requests; see `protocol.Engine.set_calibrated_depths`."""
        self._calibrated = dict(depths)
