"""Chains as Triton kernels against torch's operators and the compiled chain, on real decode steps too.

They run here in Triton's interpreter (`tests/interpreter.py`), on a GPU machine as they are; and Triton's
compiler takes them for a GPU, which needs none.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.model.native.structures import Code
from server.model.replay import bound_steps, kernel_text, program, step_replay
from server.model.replay.bound import Bound
from server.model.replay.bound_chain import BoundChain
from server.model.replay.chain import Chain, Instruction, Operand, fused
from server.model.replay.lowering import Place
from server.model.replay.noted_step import StepNoter
from server.model.replay.tape import TapeWriter, Value
from tests.model.replay.test_chain import OPERATORS, assert_close, drawn, rms_norm, rotate
from tests.parity.generation import generate, greedy, open_core
from tests.parity.zoo import BY_NAME, random_prompt, save_model

triton = pytest.importorskip(
    "triton",
    reason="no triton, which the dev extra installs on Linux x86-64: its kernels are not tested",
)

from server.model.replay.triton_chain import TritonChain  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)  # numpy, of the interpreter's lanes that nobody reads
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Of ||Triton - C|| / ||C||, which both round where the other does."""


@pytest.fixture(autouse=True)
def _as_the_runner_does() -> Iterator[None]:
    with torch.inference_mode():
        yield


def chained(function: Callable[..., Tensor | Sequence[Tensor]], *given: Tensor) -> list[Tensor]:
    """What `function` gives, computed by nothing but kernels."""
    writer = TapeWriter()
    with writer:
        made = function(*given)
    results = [writer.value_of(one) for one in ([made] if isinstance(made, Tensor) else made)]
    memory = dict(writer.tape.given)
    for chain in fused(writer.tape.calls, results):
        assert isinstance(chain, Chain)
        for value in chain.stores:
            whole = torch.full((span(value),), torch.nan, dtype=value.dtype, device=DEVICE)
            memory[value.root] = whole.as_strided(value.size, value.stride)
        views = [viewed(operand.value, memory) for operand in chain.operands]
        TritonChain(chain).run(views)
    return [viewed(value, memory) for value in results]


def viewed(value: Value, memory: dict[int, Tensor]) -> Tensor:
    return memory[value.root].as_strided(value.size, value.stride, value.offset)


def span(value: Value) -> int:
    """Elements from the first to the last."""
    pairs = zip(value.size, value.stride, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(5, 2), (70, 24), (1, 64), (2, 1100)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_torch_s(name: str, num_rows: int, width: int, dtype: torch.dtype) -> None:
    """Many vectors a program, one, and several programs a vector."""
    x, weight, bias = on_device(
        drawn(1, num_rows, width, dtype=dtype), drawn(width, dtype=dtype), drawn(width, dtype=dtype)
    )
    assert_close(
        chained(OPERATORS[name], 3 * x, weight, bias)[0], OPERATORS[name](3 * x, weight, bias)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_vectors_may_lie_anywhere(name: str) -> None:
    """Heads of a product that others share, transposed, and repeated along an outer dimension."""
    operator = OPERATORS[name]
    product, weight, bias = on_device(
        drawn(1, 7, 5 * 32 + 16), drawn(1, 7, 32, seed=1), drawn(1, 7, 32, seed=2)
    )

    def of(whole: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        heads = whole[..., 16:].view(1, 7, 5, 32).transpose(1, 2)
        if name.startswith("layer norm") or name == "rms norm in one":
            return operator(heads, weight[0, 0], bias[0, 0])
        return operator(heads, weight.unsqueeze(1), bias.unsqueeze(1))

    assert_close(chained(of, product, weight, bias)[0], of(product, weight, bias))


def test_outer_dimensions_of_any_order() -> None:
    (x,) = on_device(drawn(2, 3, 4, 5, 16))
    weight = x[:, :, :1, :1] * 2

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight).permute(2, 0, 3, 1, 4) + 1

    assert_close(chained(function, x, weight)[0], function(x, weight))


@pytest.mark.parametrize("wrong", ["{a} - {b}", "{a} + 1.0001 * {b}"])
def test_a_wrong_operator_shows(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = on_device(drawn(1, 3, 24), drawn(24, seed=1), drawn(24, seed=2))
    monkeypatch.setitem(kernel_text._OPERATORS, Code.ADD, wrong)
    with pytest.raises(AssertionError):
        assert_close(chained(rotate, x, weight, bias)[0], rotate(x, weight, bias))


@pytest.mark.parametrize(("num_rows", "width"), [(70, 24), (4, 1100)])
def test_a_vector_s_result_does_not_depend_on_its_neighbours(num_rows: int, width: int) -> None:
    x, weight, bias = on_device(drawn(1, num_rows, width), drawn(width), drawn(width, seed=2))
    for operator in (rms_norm, rotate, OPERATORS["gate"]):
        (whole,) = chained(operator, x, weight, bias)
        for row in (0, num_rows // 2, num_rows - 1):
            (alone,) = chained(operator, x[:, row : row + 1].clone(), weight, bias)
            assert torch.equal(alone[0, 0], whole[0, row])


def test_numbers_of_rows_share_a_kernel() -> None:
    def source(num_rows: int) -> str:
        x, cos = drawn(1, num_rows, 4, 16), drawn(num_rows, 1, 16)
        sin = cos + 1
        writer = TapeWriter()
        with writer:
            made = rotate(x, cos, sin)
        (chain,) = fused(writer.tape.calls, [writer.value_of(made)])
        assert isinstance(chain, Chain)
        return TritonChain(chain).source

    assert source(2) == source(64)


FORMULAS: dict[Code, Callable[[Tensor, Tensor], Tensor]] = {
    Code.COPY: lambda x, y: x,
    Code.ADD: lambda x, y: x + y,
    Code.SUB: lambda x, y: x - y,
    Code.MUL: lambda x, y: x * y,
    Code.DIV: lambda x, y: x / y,
    Code.NEG: lambda x, y: -x,
    Code.SQUARE: lambda x, y: x * x,
    Code.RSQRT: lambda x, y: x.rsqrt(),
    Code.MEAN: lambda x, y: x.mean(-1, keepdim=True),
    Code.SIGMOID: lambda x, y: x.sigmoid(),
    Code.SILU: lambda x, y: functional.silu(x),
    Code.TANH: lambda x, y: x.tanh(),
    Code.GELU_TANH: lambda x, y: functional.gelu(x, approximate="tanh"),
    Code.RELU: lambda x, y: x.relu(),
    Code.ROUND: lambda x, y: x.bfloat16().float(),
}
TWO = {Code.ADD, Code.SUB, Code.MUL, Code.DIV}
WIDTH = 20


def vector(root: int, *size: int, dtype: torch.dtype = torch.float32) -> Value:
    strides = torch.empty(size, device="meta").stride()
    return Value(root, size, strides, 0, dtype)


def one_instruction(code: Code, b: Place | float | None, length: int) -> Chain:
    """`x[3, WIDTH] -> out[3, length]`, with `y [3, WIDTH]` for a second."""
    values = vector(0, 3, WIDTH), vector(1, 3, WIDTH), vector(2, 3, length)
    return Chain(
        (3,),
        tuple(Operand(value, (value.stride[0],)) for value in values),
        (
            Instruction(Code.LOAD, Place(0, 0, WIDTH), None, operand=0),
            Instruction(Code.LOAD, Place(1, 0, WIDTH), None, operand=1),
            Instruction(code, Place(2, 0, length), Place(0, 0, WIDTH), b),
            Instruction(Code.STORE, None, Place(2, 0, length), operand=2),
        ),
        (WIDTH, WIDTH, length),
        (values[2],),
    )


def test_every_instruction_is_here() -> None:
    assert {*FORMULAS, Code.LOAD, Code.STORE} == set(Code)


@pytest.mark.parametrize("second", ["vector", "first", "number"])
@pytest.mark.parametrize("code", FORMULAS, ids=lambda code: code.name)
def test_an_instruction(code: Code, second: str) -> None:
    if code not in TWO and second != "vector":
        return
    x, y = on_device(drawn(3, WIDTH), drawn(3, WIDTH, seed=1))
    x = x.abs() + 0.1 if code is Code.RSQRT else x
    seconds = {"vector": y, "first": y[:, 4:5], "number": torch.tensor(0.7)}
    b: dict[str, Place | float] = {
        "vector": Place(1, 0, WIDTH), "first": Place(1, 4, 1), "number": 0.7
    }  # fmt: skip
    length = 1 if code is Code.MEAN else WIDTH
    out = torch.full((3, length), torch.nan, device=DEVICE)
    TritonChain(one_instruction(code, b[second] if code in TWO else None, length)).run([x, y, out])
    torch.testing.assert_close(out, FORMULAS[code](x, seconds[second]), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("code", FORMULAS, ids=lambda code: code.name)
def test_extremes_are_torch_s(code: Code) -> None:
    x, y = on_device(drawn(3, WIDTH), drawn(3, WIDTH, seed=1))
    extremes = [torch.nan, torch.inf, -torch.inf, 1e30, -200.0, 0.0, 1e-8, 3e-3, -1e-4]
    x[1, : len(extremes)] = torch.tensor(extremes)
    length = 1 if code is Code.MEAN else WIDTH
    out = torch.zeros(3, length, device=DEVICE)
    b = Place(1, 0, WIDTH) if code in TWO else None
    TritonChain(one_instruction(code, b, length)).run([x, y, out])
    expected = FORMULAS[code](x, y)
    torch.testing.assert_close(out, expected, rtol=4e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("number", [1e-40, 1e300, -torch.inf, -0.0, 3.0])
def test_a_constant_is_float32(number: float) -> None:
    x, y = on_device(drawn(3, WIDTH).abs(), drawn(3, WIDTH))
    out = torch.zeros(3, WIDTH, device=DEVICE)
    TritonChain(one_instruction(Code.MUL, number, WIDTH)).run([x, y, out])
    torch.testing.assert_close(out, x * ctypes.c_float(number).value)


@pytest.mark.parametrize("width", [WIDTH, 1300])
def test_parts_of_registers_are_written_over_and_read(width: int) -> None:
    """Halves exchanged, the middle of that negated, and a part that straddles all of these doubled."""
    half, quarter = width // 2, width // 4
    x, out = vector(0, 3, width), vector(1, 3, half)
    chain = Chain(
        (3,),
        (Operand(x, (width,)), Operand(out, (half,))),
        (
            Instruction(Code.LOAD, Place(0, 0, width), None, operand=0),
            Instruction(Code.COPY, Place(1, 0, half), Place(0, half, half)),
            Instruction(Code.COPY, Place(1, half, half), Place(0, 0, half)),
            Instruction(Code.NEG, Place(1, quarter, half), Place(1, quarter, half)),
            Instruction(Code.ADD, Place(0, 0, half), Place(1, 3, half), Place(1, 3, half)),
            Instruction(Code.STORE, None, Place(0, 0, half), operand=1),
        ),
        (width, width),
        (out,),
    )
    (given,) = on_device(drawn(3, width))
    turned = torch.cat((given[:, half:], given[:, :half]), dim=-1)
    turned[:, quarter : quarter + half] *= -1
    found = torch.full((3, half), torch.nan, device=DEVICE)
    TritonChain(chain).run([given, found])
    assert torch.equal(found, 2 * turned[:, 3 : 3 + half])


def test_a_number_in_the_host_s_memory() -> None:
    chain = one_instruction(Code.MUL, Place(1, 0, 1), WIDTH)
    number = Operand(vector(1), (0,))
    instructions = list(chain.instructions)
    instructions[1] = replace(instructions[1], out=Place(1, 0, 1))
    chain = replace(
        chain,
        operands=(chain.operands[0], number, chain.operands[2]),
        instructions=tuple(instructions),
    )
    (x,) = on_device(drawn(3, WIDTH))
    out = torch.zeros(3, WIDTH, device=DEVICE)
    TritonChain(chain, on_host=[1]).run([x, torch.tensor(0.7), out])
    torch.testing.assert_close(out, x * 0.7)


class Beside(BoundChain):
    """A bound chain and the kernel of the same chain, compared whenever it has run."""

    sources: ClassVar[set[str]]
    num_compared = 0

    def __init__(self, chain: Chain) -> None:
        super().__init__(chain)
        self._chain = chain
        self._addresses: dict[int, int] = {}
        self._kernel = TritonChain(chain)
        self.sources.add(self._kernel.source)

    def place(self, index: int, start: int) -> None:
        super().place(index, start)
        self._addresses[index] = start

    def compare(self) -> None:
        written = self._chain.stores
        tensors = [self._copied(i, o.value) for i, o in enumerate(self._chain.operands)]
        expected = [tensor.clone() for tensor in tensors]
        for operand, tensor in zip(self._chain.operands, tensors, strict=True):
            if operand.value in written:
                tensor.fill_(torch.nan)
        self._kernel.run(tensors)
        for operand, tensor, own in zip(self._chain.operands, tensors, expected, strict=True):
            error = (tensor.double() - own.double()).norm()
            assert error <= TOLERANCE[operand.value.dtype] * own.double().norm(), operand
        type(self).num_compared += len(written)

    def _copied(self, index: int, value: Value) -> Tensor:
        """A value out of the program's memory, laid out as there."""
        num_bytes = span(value) * value.dtype.itemsize
        memory = (ctypes.c_char * num_bytes).from_address(self._addresses[index])
        whole = torch.frombuffer(bytearray(memory), dtype=value.dtype).to(DEVICE)
        return whole.as_strided(value.size, value.stride)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "gemma3", "qwen3", "phi3", "gpt_neox", "olmo2", "gpt_oss", "cohere"],
)
def test_chains_of_decode_steps_are_the_compiled_kernel_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    class Compared(Beside):
        sources: ClassVar[set[str]] = set()

    monkeypatch.setattr(step_replay, "MIN_STEPS", 1)
    # In memory for more rows than there are, something would be compared that nobody wrote.
    monkeypatch.setattr(StepNoter, "up_to", lambda self, num_rows, max_rows: None)
    kernels = program.Program._kernels

    def one_by_one(
        self: program.Program, steps: Sequence[Bound], *, is_longest: bool
    ) -> Callable[[], None]:
        runs = [
            (kernels(self, [step], is_longest=is_longest and index == 0), step)
            for index, step in enumerate(steps)
        ]

        def run() -> None:
            for run_one, step in runs:
                run_one()
                if isinstance(step, Compared):
                    step.compare()

        return run

    monkeypatch.setattr(bound_steps, "BoundChain", Compared)
    monkeypatch.setattr(program.Program, "_kernels", one_by_one)
    with open_core(save_model(BY_NAME[name], tmp_path), dtype=dtype) as core:
        base = core.registry.select(core.info.name, None)
        prompts = [random_prompt(4 + index, seed=index) for index in range(3)]
        generate(core, [greedy(f"r{i}", prompt, base, 4) for i, prompt in enumerate(prompts)])
        assert core.runner.replay is not None
        assert core.runner.replay.why_off is None
    assert Compared.num_compared > 10
    assert 1 < len(Compared.sources) < 30


def test_the_compiler_takes_kernels_for_a_gpu() -> None:
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_chains.py")],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    kernels = {made["name"]: made for made in map(json.loads, found.stdout.splitlines())}
    assert kernels.keys() == {"rms norm", "rotate", "gate", "gelu"}
    for kernel in kernels.values():
        assert kernel["is_rounded"], kernel
        assert kernel["is_vectorised"], kernel
        assert not kernel["is_fused"], kernel  # every operator rounds
        # A mean is summed by warps; all else is done where it was loaded.
        assert (kernel["shared_bytes"] > 0) == (kernel["name"] == "rms norm"), kernel
