"""Many adapters of few rows each: batched products give what each row has alone, in few calls."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import context
from server.model.attention import AttentionProbe
from server.model.batch import BatchedSequence
from server.model.lora import LoraHooks, LoraStep, LoraWeights, apply_per_row
from server.model.stack import MAX_ROWS, STACK_SIZE, ReachedRows, Segment
from tests.model.test_lora import IN, OUT, TOLERANCE, rows_of

NUM_SLOTS = 2 * STACK_SIZE + 3
NUM_LAYERS = 4

Sequences = list[BatchedSequence]

LAYOUTS = {
    "one row each": rows_of(*((slot, 4, 1) for slot in range(NUM_SLOTS))),
    "as many rows each": rows_of(*((slot, 4, 1) for slot in range(5) for _ in range(3))),
    "uneven": rows_of(*((slot, 4, 1 + slot % 3) for slot in range(NUM_SLOTS))),
    "depths": rows_of(*((slot, d, 1) for slot in range(6) for d in (4, 3, 1))),
    "base rows first": rows_of((-1, 0, 3), (0, 4, 1), (1, 4, 1), (2, 2, 1)),
    "gaps": rows_of((0, 4, 1), (1, 4, 1), (3, 4, 1), (4, 4, 2), (9, 4, 1), (18, 4, 1)),
    "long among short": rows_of((0, 4, 1), (1, 4, MAX_ROWS + 1), (2, 4, 1), (3, 4, 1)),
    "padding too dear": rows_of((0, 4, MAX_ROWS), (1, 4, 1), (2, 4, 1), (3, 4, 1)),
    "decodes, then prefills": rows_of(
        *((slot, 4, 1) for slot in (0, 1, 2)), *((slot, 4, 7) for slot in (0, 1, 2))
    ),
}


def draw(slot: int, dtype: torch.dtype, rank: int, kind: str, scaling: float) -> LoraWeights:
    generator = torch.Generator().manual_seed(slot)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    return LoraWeights(
        tensor(rank, IN),
        tensor(OUT, rank),
        scaling,
        bias=tensor(OUT) if kind == "bias" else None,
        gain=1 + tensor(OUT) if kind == "dora" else None,
    )


class Bench:
    """One hooked module with an adapter in each slot."""

    def __init__(self, weights: dict[int, LoraWeights], *, num_stacked: int = NUM_SLOTS) -> None:
        self.weights = weights
        self.dtype = weights[0].lora_A.dtype
        self.module = nn.Linear(IN, OUT).to(self.dtype)
        self.hooks = LoraHooks(NUM_LAYERS, num_stacked=num_stacked)
        for slot, lora in weights.items():
            self.hooks.load(slot, {"m": (self.module, 1, lora)})
        self.hooks.install(NUM_LAYERS)

    def run(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Input and output of one step, in layer 1."""
        num_rows = sum(len(sequence.token_ids) for sequence in sequences)
        x = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(7)).to(self.dtype)
        step = context.StepContext(AttentionProbe(), LoraStep.build(sequences, NUM_LAYERS))
        with context.step(step), torch.inference_mode():
            return x, self.module(x)

    def alone(self, sequences: Sequences, x: Tensor) -> tuple[Tensor, Tensor]:
        """The base module's output, and what each row gets by the plain formula."""
        base = nn.functional.linear(x, self.module.weight, self.module.bias).detach()
        slots = [s.slot for s in sequences for _ in s.token_ids]
        depths = [s.depth for s in sequences for _ in s.token_ids]
        bias = self.module.bias.detach()
        return base, apply_per_row(base, x, slots, depths, 1, self.weights, bias)


def same(slot: int) -> tuple[int, str, float]:
    return 4, "plain", 1.5


def scalings(slot: int) -> tuple[int, str, float]:
    return 4, "plain", 0.5 + slot


def ranks(slot: int) -> tuple[int, str, float]:
    return (4, 4, 8)[slot % 3], "plain", 1.5


def kinds(slot: int) -> tuple[int, str, float]:
    return 4, ("plain", "plain", "bias", "plain", "dora")[slot % 5], 1.5


def bench_of(mix, dtype: torch.dtype = torch.float32, **options: int) -> Bench:
    made = {}
    for slot in range(NUM_SLOTS):
        rank, kind, scaling = mix(slot)
        made[slot] = draw(slot, dtype, rank, kind, scaling)
    return Bench(made, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mix", [same, scalings, ranks, kinds])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_as_if_it_were_alone(layout: str, mix, dtype: torch.dtype) -> None:
    bench = bench_of(mix, dtype)
    sequences = LAYOUTS[layout]
    x, output = bench.run(sequences)
    base, expected = bench.alone(sequences, x)
    error = (output - expected).float().norm()
    assert error <= TOLERANCE[dtype] * expected.float().norm()
    change = (expected - base).float().norm()
    assert error < 0.1 * change  # an adapter that was left out would show
    is_reached = torch.tensor([s.depth > 1 for s in sequences for _ in s.token_ids])
    assert torch.equal(output[~is_reached], bench.module(x)[~is_reached])


def test_a_missing_adapter_in_a_run_is_not_read() -> None:
    """What nobody filled may be anything, as NaN."""
    bench = bench_of(same)
    for stack in bench.hooks._modules["m"].stacks.values():
        stack.lora_A[2] = stack.lora_B[2] = torch.nan
    bench.hooks.unload(2)
    del bench.weights[2]
    sequences = rows_of(*((slot, 4, 1) for slot in range(6)))
    x, output = bench.run(sequences)
    assert torch.allclose(output, bench.alone(sequences, x)[1], atol=1e-5)


class Products(TorchDispatchMode):
    """Counts matrix products; the module's own is a `linear`, and none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        self.num += name in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def num_products(bench: Bench, sequences: Sequences) -> int:
    with Products() as counted:
        bench.run(sequences)
    return counted.num


def test_many_adapters_take_two_products_a_stack() -> None:
    sequences = rows_of(*((slot, 4, 1) for slot in range(2 * STACK_SIZE)))
    assert num_products(bench_of(same), sequences) == 2 * 2
    assert num_products(bench_of(same, num_stacked=0), sequences) == 2 * 2 * STACK_SIZE


def test_equal_modules_share_one_plan() -> None:
    hooks = LoraHooks(NUM_LAYERS, num_stacked=4)
    modules = {name: nn.Linear(IN, OUT) for name in ("q", "k")}
    for slot in range(3):
        lora = draw(slot, torch.float32, 4, "plain", 1.5)
        hooks.load(slot, {name: (module, 0, lora) for name, module in modules.items()})
    q, k = (hooks._modules[name].stacked for name in modules)
    assert q is k
    reached = ReachedRows([Segment(slot, slot, slot + 1) for slot in range(3)])
    assert reached.batches(q) is reached.batches(k)


def test_an_empty_stack_is_let_go() -> None:
    bench = bench_of(ranks)
    stacks = bench.hooks._modules["m"].stacks
    assert {rank for rank, _ in stacks} == {4, 8}
    for slot in range(2, NUM_SLOTS, 3):
        bench.hooks.unload(slot)
    assert {rank for rank, _ in bench.hooks._modules["m"].stacks} == {4}
