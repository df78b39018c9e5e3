"""A chain of elementwise operators as one Triton kernel, for CUDA devices. Importing this needs triton.

`kernel_text` writes it, and it is compiled when it first runs; equal texts are one kernel, so that all
layers of a model share theirs, and so do all numbers of rows.
"""

import linecache
from collections.abc import Collection, Sequence
from functools import cache
from hashlib import sha256
from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from server.model.replay.chain import Chain
from server.model.replay.kernel_text import KernelText
from server.model.replay.lowered import RunChain


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x), without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x > 0.0, 1.0, e), 1.0 + e)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """sign(x) (1 - e^(-2|x|)) / (1 + e^(-2|x|)); near 0, where that cancels, the odd series up to x^7."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - e, 1.0 + e)
    far = tl.where(x < 0.0, -far, far)
    square = x * x
    near = square * (-17.0 / 315.0) + 2.0 / 15.0
    near = x + x * square * (near * square - 1.0 / 3.0)
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def _gelu_tanh(x):  # type: ignore[no-untyped-def]
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"""
    inner = (x + x * x * x * 0.044715) * 0.7978845608
    return x * 0.5 * (1.0 + _tanh(inner))


@triton.jit
def _rounded(x):  # type: ignore[no-untyped-def]
    """To the nearest bfloat16."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _rounded_bits(x):  # type: ignore[no-untyped-def]
    """The same in Triton's interpreter, whose own conversion cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, up.to(tl.float32, bitcast=True), x)


_NAMES = {
    "tl": tl,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu_tanh": _gelu_tanh,
    "rounded": _rounded_bits if triton.knobs.runtime.interpret else _rounded,
}
"""What a text may name."""


class TritonChain:
    """One chain, to be run over any memory."""

    def __init__(self, chain: Chain, on_host: Collection[int] = ()) -> None:
        """on_host: operands that are one number, in the host's memory while the others are on the device."""
        text = KernelText(chain, on_host)
        self.source = text.source()
        self._on_host = frozenset(on_host)
        self._kernel = _kernel(self.source)
        self._grid = text.grid
        self._numbers = (prod(chain.outer), *chain.outer, *text.strides())
        self._num_warps = text.num_warps

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Compute every vector: one launch, without waiting or allocating.

        tensors: of each operand its value, with that size and stride, starting at the value's own first
        element. What is written must not overlap what is read. The first run compiles, so it must not be
        recorded; those after it may be.
        """
        arguments: list[Any] = list(tensors)
        for index in self._on_host:
            arguments[index] = tensors[index].item()
        self._kernel[self._grid](
            *arguments,
            *self._numbers,
            num_warps=self._num_warps,
            enable_fp_fusion=False,  # each operator rounds, as torch's do
        )


def bind(chain: Chain, on_host: Collection[int]) -> RunChain:
    """See `lowered.BindChain`."""
    return TritonChain(chain, on_host).run


@cache
def _kernel(source: str) -> Any:
    """The kernel of a text, compiled by Triton for the arguments that it gets."""
    name = f"<chain {sha256(source.encode()).hexdigest()[:16]}>"
    # Where `inspect`, by which Triton reads a function, finds the text of one that is in no file.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": __name__, **_NAMES}
    exec(compile(source, name, "exec"), names)
    sizes = [word for word in names["chain"].__code__.co_varnames if word.startswith("num_")]
    return triton.jit(names["chain"], do_not_specialize=sizes)
