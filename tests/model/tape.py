"""A recorder of steps that needs no GPU and has a CUDA graph's hazards: `recorder.Recorder` for tests.

It notes every operator that a step calls, with the very tensors and numbers it was called with, and
replays them one by one: no Python of the step runs again. So a value that Python chose is what it was
when the step was recorded, an output lies where it lay, and what would make the host wait for a device
or copy to it from unpinned memory is an error, as it is while a CUDA graph is captured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from server.model.recorder import Recording
from server.model.replay.lowered import Beside, Join

_WAITS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.item,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
}


@dataclass(frozen=True)
class _Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    """Those that are new; a view needs no copy, and what is changed in place is there already."""


class Tape(TorchDispatchMode):
    """`recorder.Recording`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        packet = func.overloadpacket
        is_mask = any(t.dtype == torch.bool for t in tree_iter(args[1:2]) if isinstance(t, Tensor))
        if packet in _WAITS or (packet is torch.ops.aten.index and is_mask):
            raise RuntimeError(f"{func} waits for the device, which a recording cannot")
        if packet is torch.ops.aten.lift_fresh and args[0].dim():
            raise RuntimeError("a tensor made of Python's values cannot be recorded")
        result = func(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in inputs}
        new = [
            t
            for t in tree_iter(result)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        if new or func._schema.is_mutable:
            self.calls.append(_Call(func, args, kwargs, new))
        return result

    def replay(self) -> None:
        """See `recorder.Recording.replay`."""
        for call in self.calls:
            result = call.function(*call.args, **call.kwargs)
            if call.outputs:
                again = [t for t in tree_iter(result) if isinstance(t, Tensor)]
                for output, value in zip(call.outputs, again, strict=True):
                    output.copy_(value)


class TapeRecorder:
    """`recorder.Recorder`."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """See `recorder.Recorder.warm_up`."""
        step()

    def settle(self) -> None:
        """See `recorder.Recorder.settle`: nothing runs that did not end."""

    def record(self, step: Callable[[], None]) -> Recording:
        """See `recorder.Recorder.record`."""
        tape = Tape()
        with tape:
            step()
        return tape

    def fork(self) -> Beside:
        """See `recorder.Recorder.fork`: here one thing comes after the other."""

        def beside(launch: Callable[[], None]) -> Join:
            launch()
            return lambda: None

        return beside
