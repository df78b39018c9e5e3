"""A chain of elementwise operators as one Triton kernel, for CUDA devices. Importing this needs triton.

The kernel's text is written from the chain's expressions and compiled when it first runs; equal texts are
one kernel, so that all layers of a model share theirs, and so do all numbers of rows. A program takes some
vectors whole, or, where nothing depends on a whole vector, a tile of some: which of them it takes depends on
the vectors' length alone, so that a vector's result does not depend on how many there are.

All arithmetic is float32, as `chain.c` has it.
"""

import linecache
from collections.abc import Collection, Sequence
from ctypes import c_float
from functools import cache
from hashlib import sha256
from math import isinf, isnan, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.model.native.library import Code
from server.model.replay.chain import Chain
from server.model.replay.expressions import (
    Apply,
    At,
    Constant,
    Expressions,
    First,
    Join,
    Load,
    Mean,
)

_TILE = 512
"""Elements of a program that needs no whole vector: small, as a step of one row should use every processor."""
_MIN_WARPS, _MAX_WARPS = 4, 16
_ELEMENTS_PER_WARP = 256
"""In one program: 16 bytes of bfloat16 for each thread."""


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
"""What the texts may name."""

_OPERATORS = {
    Code.ADD: "{a} + {b}",
    Code.SUB: "{a} - {b}",
    Code.MUL: "{a} * {b}",
    Code.DIV: "tl.div_rn({a}, {b})",
    Code.NEG: "{a} * -1.0",  # Triton's own is 0 - a, which makes 0 of 0
    Code.SQUARE: "{a} * {a}",
    Code.RSQRT: "tl.rsqrt({a})",
    Code.SIGMOID: "sigmoid({a})",
    Code.SILU: "{a} * sigmoid({a})",
    Code.TANH: "tanh({a})",
    Code.GELU_TANH: "gelu_tanh({a})",
    Code.RELU: "tl.where({a} < 0.0, 0.0, {a})",
    Code.ROUND: "rounded({a})",
}


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


@cache
def _kernel(source: str) -> Any:
    """The kernel of a text, compiled by Triton for the arguments that it gets."""
    name = f"<chain {sha256(source.encode()).hexdigest()[:16]}>"
    # Where `inspect`, by which Triton reads a function, finds the text of one that is in no file.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": __name__, **_NAMES}
    exec(compile(source, name, "exec"), names)  # noqa: S102 -- our own text
    sizes = [word for word in names["chain"].__code__.co_varnames if word.startswith("num_")]
    return triton.jit(names["chain"], do_not_specialize=sizes)


class KernelText:
    """Writes the kernel of a chain, and says how it is launched."""

    def __init__(self, chain: Chain, on_host: Collection[int] = ()) -> None:
        self._chain = chain
        self._on_host = on_host
        self._expressions = Expressions(chain)
        self._lines: list[str] = []
        self._variables: dict[tuple[int, int | None, int | None], str] = {}
        width = self._expressions.width
        whole = 1 << (width - 1).bit_length()
        is_tiled = not self._expressions.has_mean and whole > _TILE
        self._block = _TILE if is_tiled else whole
        self._rows = max(1, _TILE // self._block)
        num_elements = self._rows * self._block
        self.num_warps = min(max(num_elements // _ELEMENTS_PER_WARP, _MIN_WARPS), _MAX_WARPS)
        self._num_tiles = -(-width // self._block)
        self.grid = (-(-prod(chain.outer) // self._rows), self._num_tiles)

    def strides(self) -> list[int]:
        """What `chain` takes after the sizes: those that repeat nothing."""
        return [
            stride for operand in self._chain.operands for stride in operand.strides if stride != 0
        ]

    def source(self) -> str:
        """Of the function `chain`: operands, number of vectors, outer sizes, strides."""
        self._lines = []
        self._variables = {}
        names = [f"p{index}" for index in range(len(self._chain.operands))]
        names += ["num_vectors", *(f"num_{d}" for d in range(len(self._chain.outer)))]
        self._places(names)
        for stored in self._expressions.stored:
            place = f"q{stored.operand}"
            is_written = [] if self._is_repeated(stored.operand) else self._is_vector()
            if stored.length == 1:
                value = self._one(stored.of.index, stored.of.shift)
                where = f"{place} + zero"
                if self._num_tiles > 1:
                    is_written.append("(tl.program_id(1) == 0)")
            else:
                value = self._along(stored.of.index, stored.of.shift)
                where = f"{place} + column"
                is_written += self._is_within(0, stored.length)
            element = f"{value}.to(p{stored.operand}.dtype.element_ty)"
            self._lines.append(f"tl.store({where}, {element}{_mask(is_written)})")
        body = "".join(f"    {line}\n" for line in self._lines)
        return f"def chain({', '.join(names)}):\n{body}"

    def _places(self, names: list[str]) -> None:
        """Which vectors and columns a program has, and where each operand's begin; adds the strides' names."""
        self._lines += [
            f"vector = tl.program_id(0) * {self._rows} + tl.arange(0, {self._rows})[:, None]",
            f"column = tl.program_id(1) * {self._block} + tl.arange(0, {self._block})[None, :]",
            "zero = tl.zeros((1, 1), tl.int32)",
            "rest = vector",
        ]
        for d in range(len(self._chain.outer) - 1, 0, -1):
            self._lines += [f"at_{d} = (rest % num_{d}).to(tl.int64)", f"rest = rest // num_{d}"]
        self._lines.append("at_0 = rest.to(tl.int64)")
        for index, operand in enumerate(self._chain.operands):
            steps = [d for d, stride in enumerate(operand.strides) if stride != 0]
            names += [f"s{index}_{d}" for d in steps]
            if index not in self._on_host:
                terms = [f"p{index}", *(f"at_{d} * s{index}_{d}" for d in steps)]
                self._lines.append(f"q{index} = {' + '.join(terms)}")

    def _is_repeated(self, operand: int) -> bool:
        """Whether all vectors are the same one, which is then there for vectors that are not, too."""
        return not any(self._chain.operands[operand].strides)

    def _is_vector(self) -> list[str]:
        return ["(vector < num_vectors)"] if self._rows > 1 else []

    def _is_within(self, shift: int, length: int) -> list[str]:
        """That a column, `shift` places further on, is one of `length`."""
        conditions = [f"({_further(shift)} >= 0)"] if shift < 0 else []
        if self._num_tiles * self._block + shift > length:
            conditions.append(f"({_further(shift)} < {length})")
        return conditions

    def _along(self, index: int, shift: int) -> str:
        """Variable `[rows or 1, block or 1]` of an expression at each column, `shift` places further on."""
        return self._variable(index, shift, None)

    def _one(self, index: int, place: int) -> str:
        """Variable `[rows or 1, 1]` of an expression at one place."""
        return self._variable(index, None, place)

    def _variable(self, index: int, shift: int | None, place: int | None) -> str:
        node = self._expressions.nodes[index]
        if isinstance(node, Constant | First | Mean):
            shift = place = None  # the same everywhere
        key = (index, shift, place)
        known = self._variables.get(key)
        if known is None:
            text = self._text(index, shift, place)
            known = self._variables[key] = f"v{len(self._variables)}"
            self._lines.append(f"{known} = {text}")
        return known

    def _text(self, index: int, shift: int | None, place: int | None) -> str:
        def at(of: At) -> str:
            if shift is not None:
                return self._along(of.index, of.shift + shift)
            return self._one(of.index, of.shift + (place or 0))

        match self._expressions.nodes[index]:
            case Constant(value):
                return _constant(value)
            case First(of):
                return self._one(of.index, of.shift)
            case Mean(of, 1):
                return self._one(of.index, of.shift)
            case Mean(of, length):
                values = self._along(of.index, of.shift)
                is_within = self._is_within(0, length)
                if is_within:
                    values = f"tl.where({' & '.join(is_within)}, {values}, 0.0)"
                else:  # else a vector that is the same everywhere would be summed once
                    values = f"tl.where(column >= 0, {values}, 0.0)"
                total = f"tl.sum({values}, axis=1, keep_dims=True)"
                return f"tl.div_rn({total}, {_constant(length)})"
            case Apply(code, a, b):
                return _OPERATORS[code].format(a=at(a), b=None if b is None else at(b))
            case Load(operand, length):
                return self._load(operand, length, shift, place)
            case Join(parts):
                if shift is None:
                    assert place is not None
                    (own,) = (part for part in parts if part.cut(place, place + 1))
                    return self._one(own.of.index, own.of.shift + place - own.start)
                # Each part as if it were all of the vector, and of these the one whose turn it is.
                text = ""
                for part in reversed(parts):
                    value = self._along(part.of.index, part.of.shift + shift - part.start)
                    is_its = f"{_further(shift)} < {part.start + part.length}"
                    text = f"tl.where({is_its}, {value}, {text})" if text else value
                return text

    def _load(self, operand: int, length: int, shift: int | None, place: int | None) -> str:
        if operand in self._on_host:
            return f"tl.full((1, 1), p{operand}, tl.float32)"
        is_there = [] if self._is_repeated(operand) else self._is_vector()
        if shift is None:
            where = f"zero + {place}"
        else:
            where = _further(shift)
            is_there += self._is_within(shift, length)
        mask = _mask(is_there)
        other = ", other=0.0" if mask else ""
        return f"tl.load(q{operand} + ({where}){mask}{other}).to(tl.float32)"


def _further(shift: int) -> str:
    return f"column + {shift}" if shift > 0 else f"column - {-shift}" if shift else "column"


def _mask(conditions: Sequence[str]) -> str:
    return f", mask={' & '.join(conditions)}" if conditions else ""


def _constant(value: float) -> str:
    """As float32 whatever it is, where Triton would make some float64."""
    single = c_float(value).value
    text = f'float("{single}")' if isinf(single) or isnan(single) else repr(single)
    return f"tl.full((1, 1), {text}, tl.float32)"
