"""torch's elementwise operators as instructions for the compiled chain (`native/chain.c`).

What is not here, or not in the form that is known here, stays torch's own. All arithmetic is float32, and is
rounded where torch would have written bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from server.model.native.structures import Code
from server.model.replay.tape import Call, Value

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Place:
    """`length` floats of a register, from `start` on."""

    register: int
    start: int
    length: int


Second = Place | float | None


class Emitter(Protocol):
    """Where instructions go."""

    def read(self, value: Value) -> Place:
        """The last dimension of a value, one vector at a time."""

    def new(self, length: int) -> Place:
        """A register."""

    def emit(self, code: Code, out: Place, a: Place, b: Second = None) -> None:
        """One instruction. `b` of length 1 beside a longer `a` is repeated."""


Lower = Callable[[Emitter, Call], Place]


def lowering(call: Call) -> Lower | None:
    """How to do a call in a chain; None where it cannot be."""
    packet = getattr(call.function, "overloadpacket", None)
    lower = _LOWERINGS.get(packet)
    if lower is None or len(call.outputs) != 1 or call.outputs[0] is None:
        return None
    is_float = all(value.dtype in FLOATS for value in (*call.inputs, call.outputs[0]))
    return lower if is_float and _CHECKS[packet](call, call.outputs[0]) else None


def _width(value: Value) -> int:
    return value.size[-1] if value.size else 1


def _is_vector_of(value: object, width: int) -> bool:
    return isinstance(value, Value) and _width(value) == width


def _unary(code: Code) -> Lower:
    def lower(emitter: Emitter, call: Call) -> Place:
        a = emitter.read(call.args[0])
        out = emitter.new(a.length)
        emitter.emit(code, out, a)
        return out

    return lower


def _binary(code: Code) -> Lower:
    def lower(emitter: Emitter, call: Call) -> Place:
        left, right = call.args[:2]
        assert call.outputs[0] is not None
        width = _width(call.outputs[0])
        if not _is_vector_of(left, width):
            left, right = right, left
        a = emitter.read(left)
        out = emitter.new(width)
        emitter.emit(
            code, out, a, emitter.read(right) if isinstance(right, Value) else float(right)
        )
        return out

    return lower


def _mean(emitter: Emitter, call: Call) -> Place:
    out = emitter.new(1)
    emitter.emit(Code.MEAN, out, emitter.read(call.args[0]))
    return out


def _cat(emitter: Emitter, call: Call) -> Place:
    assert call.outputs[0] is not None
    whole = emitter.new(_width(call.outputs[0]))
    at = 0
    for part in call.args[0]:
        place = emitter.read(part)
        emitter.emit(Code.COPY, Place(whole.register, at, place.length), place)
        at += place.length
    return whole


def _layer_norm(emitter: Emitter, call: Call) -> Place:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias"""
    x, _, weight, bias, eps = (*call.args, None, None, None)[:5]
    a = emitter.read(x)
    mean, centred, square = emitter.new(1), emitter.new(a.length), emitter.new(a.length)
    emitter.emit(Code.MEAN, mean, a)
    emitter.emit(Code.SUB, centred, a, mean)
    emitter.emit(Code.SQUARE, square, centred)
    scale = emitter.new(1)
    emitter.emit(Code.MEAN, scale, square)
    shifted, root = emitter.new(1), emitter.new(1)
    emitter.emit(Code.ADD, shifted, scale, 1e-5 if eps is None else float(eps))
    emitter.emit(Code.RSQRT, root, shifted)
    out = emitter.new(a.length)
    emitter.emit(Code.MUL, out, centred, root)
    for code, parameter in ((Code.MUL, weight), (Code.ADD, bias)):
        if parameter is not None:
            last, out = out, emitter.new(a.length)
            emitter.emit(code, out, last, emitter.read(parameter))
    return out


def _rms_norm(emitter: Emitter, call: Call) -> Place:
    """x / sqrt(mean(x^2) + eps) * weight"""
    x, _, weight, eps = call.args
    a = emitter.read(x)
    square, scale = emitter.new(a.length), emitter.new(1)
    emitter.emit(Code.SQUARE, square, a)
    emitter.emit(Code.MEAN, scale, square)
    shifted, root = emitter.new(1), emitter.new(1)
    emitter.emit(Code.ADD, shifted, scale, float(eps))
    emitter.emit(Code.RSQRT, root, shifted)
    normed, out = emitter.new(a.length), emitter.new(a.length)
    emitter.emit(Code.MUL, normed, a, root)
    emitter.emit(Code.MUL, out, normed, emitter.read(weight))
    return out


_LOWERINGS: dict[Any, Lower] = {
    aten.add: _binary(Code.ADD),
    aten.sub: _binary(Code.SUB),
    aten.mul: _binary(Code.MUL),
    aten.div: _binary(Code.DIV),
    aten.neg: _unary(Code.NEG),
    aten.pow: _unary(Code.SQUARE),
    aten.square: _unary(Code.SQUARE),
    aten.rsqrt: _unary(Code.RSQRT),
    aten.sigmoid: _unary(Code.SIGMOID),
    aten.silu: _unary(Code.SILU),
    aten.tanh: _unary(Code.TANH),
    aten.gelu: _unary(Code.GELU_TANH),
    aten.relu: _unary(Code.RELU),
    aten.to: _unary(Code.COPY),
    aten.mean: _mean,
    aten.cat: _cat,
    aten.layer_norm: _layer_norm,
    aten.rms_norm: _rms_norm,
}


def _is_plain(call: Call, out: Value) -> bool:
    return not call.kwargs and len(call.args) == 1 and _is_vector_of(call.args[0], _width(out))


def _is_binary(commutes: bool) -> Callable[[Call, Value], bool]:
    def check(call: Call, out: Value) -> bool:
        if call.kwargs or len(call.args) != 2:
            return False
        left, right = call.args
        width = _width(out)
        if isinstance(right, bool) or not isinstance(right, Value | int | float):
            return False
        if _is_vector_of(left, width):
            return not isinstance(right, Value) or _width(right) in (1, width)
        return commutes and isinstance(left, Value | int | float) and _is_vector_of(right, width)

    return check


def _is_square(call: Call, out: Value) -> bool:
    return not call.kwargs and len(call.args) == 2 and call.args[1] == 2


def _is_gelu(call: Call, out: Value) -> bool:
    return call.kwargs == {"approximate": "tanh"} and len(call.args) == 1


def _is_cast(call: Call, out: Value) -> bool:
    return not call.kwargs and len(call.args) == 2 and call.args[1] == out.dtype


def _is_mean(call: Call, out: Value) -> bool:
    x, dims, keeps = (*call.args, None, None)[:3]
    keeps = call.kwargs.get("keepdim", keeps)
    is_last = dims is not None and list(dims) in ([-1], [len(x.size) - 1])
    return is_last and keeps is True and call.kwargs.keys() <= {"keepdim"}


def _is_cat(call: Call, out: Value) -> bool:
    parts, dim = (*call.args, 0)[:2]
    last = len(out.size) - 1
    return (
        call.kwargs.get("dim", dim) in (-1, last)
        and call.kwargs.keys() <= {"dim"}
        and all(len(part.size) == len(out.size) and part.dtype == out.dtype for part in parts)
    )


def _is_layer_norm(call: Call, out: Value) -> bool:
    return not call.kwargs and list(call.args[1]) == [_width(out)]


def _is_rms_norm(call: Call, out: Value) -> bool:
    """With a weight and an epsilon, as `server.model.norms` calls it."""
    return (
        not call.kwargs
        and len(call.args) == 4
        and list(call.args[1]) == [_width(out)]
        and _is_vector_of(call.args[2], _width(out))
        and isinstance(call.args[3], float)
    )


_CHECKS: dict[Any, Callable[[Call, Value], bool]] = {
    aten.add: _is_binary(commutes=True),
    aten.sub: _is_binary(commutes=False),
    aten.mul: _is_binary(commutes=True),
    aten.div: _is_binary(commutes=False),
    aten.neg: _is_plain,
    aten.pow: _is_square,
    aten.square: _is_plain,
    aten.rsqrt: _is_plain,
    aten.sigmoid: _is_plain,
    aten.silu: _is_plain,
    aten.tanh: _is_plain,
    aten.gelu: _is_gelu,
    aten.relu: _is_plain,
    aten.to: _is_cast,
    aten.mean: _is_mean,
    aten.cat: _is_cat,
    aten.layer_norm: _is_layer_norm,
    aten.rms_norm: _is_rms_norm,
}
