"""What a model computes on the meta device while it is built, without torch's compiler.

transformers builds a model on the meta device, where tensors have shapes and no numbers, and then reads the
weights. Some functions are there only as decompositions, written in Python for the compiler, which they
import, and SymPy with it. The few that rotary embeddings need are computed on the CPU here, and what they
give is a meta tensor of the same shape and dtype: no more is known of one. Every other goes torch's way, and
imports what it needs: of 29 architectures that are served, one (GPT BigCode) has such a function.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from server.model import waiting_compiler

_MAX_ELEMENTS = 1 << 16
"""Of what is computed only to know its shape."""
_DRAWS = (torch.nn.init.normal_, Tensor.normal_)
_COMPUTES = (Tensor.div, Tensor.__rdiv__, Tensor.pow, Tensor.__rpow__)


def without_compiler() -> AbstractContextManager[Any]:
    """To build a model within; does nothing where the compiler does not wait."""
    return _Shapes() if waiting_compiler.is_waiting() else nullcontext()


class _Shapes(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Called for every function; within it, torch is as ever."""
        kwargs = kwargs or {}
        if func is torch.arange and str(kwargs.get("device")) == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        if func in _DRAWS:
            drawn: Tensor = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        if func in _COMPUTES and not kwargs and any(map(_is_small_meta, args)):
            return func(*map(_on_cpu, args)).to("meta")
        if func is torch.empty_like and set(kwargs) == {"device"} and _is_small_meta(args[0]):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=kwargs["device"])
        return func(*args, **kwargs)


def _is_small_meta(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_meta:
        return False
    return value.is_contiguous() and value.numel() <= _MAX_ELEMENTS


def _on_cpu(value: Any) -> Any:
    if not _is_small_meta(value):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device="cpu")
