"""The text of a chain's Triton kernel, written from the chain's expressions.

A program takes some vectors whole, or, where nothing depends on a whole vector, a tile of some. How many
depends on the vectors' length alone, so that a vector's result does not depend on how many there are; and
their number and the strides are arguments, so that steps of all sizes have one text.

All arithmetic is float32, as `chain.c` has it. What a text names besides `tl` is in `triton_chain`.
"""

from collections.abc import Collection, Sequence
from ctypes import c_float
from math import isinf, isnan, prod

from server.model.native.structures import Code
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
    Part,
)

_TILE = 512
"""Elements of a program that needs no whole vector: few, so that a step of one row uses every processor."""
_MIN_WARPS, _MAX_WARPS = 4, 16
_ELEMENTS_PER_WARP = 256
"""In one program: 16 bytes of bfloat16 for each thread."""

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


class KernelText:
    """The kernel of one chain, and how it is launched."""

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
            is_written = self._is_vector()
            if stored.length == 1:
                value = self._one(stored.of.index, stored.of.shift)
                where = place
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
        """Which vectors and columns a program has, and where they begin; adds the names of strides."""
        column = f"tl.arange(0, {self._block})[None, :]"
        if self._num_tiles > 1:
            column = f"tl.program_id(1) * {self._block} + {column}"
        self._lines += [
            f"vector = tl.program_id(0) * {self._rows} + tl.arange(0, {self._rows})[:, None]",
            f"column = {column}",
            f"zero = tl.zeros(({self._rows}, 1), tl.int32)",
            "rest = vector",
        ]
        for d in range(len(self._chain.outer) - 1, 0, -1):
            self._lines += [f"at_{d} = (rest % num_{d}).to(tl.int64)", f"rest = rest // num_{d}"]
        self._lines.append("at_0 = rest.to(tl.int64)")
        for index, operand in enumerate(self._chain.operands):
            steps = [d for d, stride in enumerate(operand.strides) if stride != 0]
            names += [f"s{index}_{d}" for d in steps]
            if index not in self._on_host:
                # As many rows where they repeat: Triton would give a smaller tile another layout.
                terms = [f"p{index}", *(f"at_{d} * s{index}_{d}" for d in steps), "zero"]
                self._lines.append(f"q{index} = {' + '.join(terms)}")

    def _is_repeated(self, operand: int) -> bool:
        """Whether all vectors are the same one, which then is there for those past the last, too."""
        return not any(self._chain.operands[operand].strides)

    def _is_vector(self) -> list[str]:
        return ["(vector < num_vectors)"] if self._rows > 1 else []

    def _is_within(self, shift: int, length: int) -> list[str]:
        """That a column, `shift` places further on, is one of `length`."""
        conditions = [f"(column >= {-shift})"] if shift < 0 else []
        if self._num_tiles * self._block > length - shift:
            conditions.append(f"(column < {length - shift})")
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
                # At least one, as a vector of one number everywhere is a tile of one column.
                condition = " & ".join(is_within) or "column >= 0"
                values = f"tl.where({condition}, {values}, 0.0)"
                total = f"tl.sum({values}, axis=1, keep_dims=True)"
                return f"tl.div_rn({total}, {_constant(length)})"
            case Apply(code, a, b):
                return _OPERATORS[code].format(a=at(a), b=None if b is None else at(b))
            case Load(operand, length):
                return self._load(operand, length, shift, place)
            case Join(parts):
                if shift is not None:
                    return self._joined(parts, shift)
                assert place is not None
                (own,) = (part for part in parts if part.cut(place, place + 1))
                return self._one(own.of.index, own.of.shift + place - own.start)

    def _joined(self, parts: Sequence[Part], shift: int) -> str:
        """Each part as if it were all of the vector, and of these the one whose turn it is."""
        text = ""
        for part in reversed(parts):
            value = self._along(part.of.index, part.of.shift + shift - part.start)
            is_its = f"column < {part.start + part.length - shift}"
            text = f"tl.where({is_its}, {value}, {text})" if text else value
        return text

    def _load(self, operand: int, length: int, shift: int | None, place: int | None) -> str:
        if operand in self._on_host:
            return f"tl.full((1, 1), p{operand}, tl.float32)"
        is_there = [] if self._is_repeated(operand) else self._is_vector()
        if shift is None:
            where = str(place)
        else:
            where = _further(shift)
            is_there += self._is_within(shift, length)
        mask = _mask(is_there)
        other = ", other=0.0" if mask else ""
        return f"tl.load(q{operand} + {where}{mask}{other}).to(tl.float32)"


def _further(shift: int) -> str:
    return f"column + {shift}" if shift > 0 else f"column - {-shift}" if shift else "column"


def _mask(conditions: Sequence[str]) -> str:
    return f", mask={' & '.join(conditions)}" if conditions else ""


def _constant(value: float) -> str:
    """As float32 whatever it is, where Triton would make some float64."""
    single = c_float(value).value
    text = f'float("{single}")' if isinf(single) or isnan(single) else repr(single)
    return f"tl.full((1, 1), {text}, tl.float32)"
