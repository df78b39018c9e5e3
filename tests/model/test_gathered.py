"""The gathered kernels against the plain formula, and stacks through which adapters come and go.

Triton's runs here in its interpreter (`tests/interpreter.py`), on a GPU machine as it is; and its compiler
takes both for several generations of GPUs, which needs none of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from server.errors import ModelError
from server.model import context, products
from server.model.attention_probe import AttentionProbe
from server.model.gathered import GatheredSlots
from server.model.gathered_kernel import GatheredKernel, Rows, TorchKernel
from server.model.gathered_step import GatheredStep
from server.model.hooks import LoraHooks
from server.model.lora import LoraWeights, apply_per_row
from server.model.stacks import RANKS, SharedInput, stack_rank
from server.model.targets import Target

triton = pytest.importorskip(
    "triton",
    reason="no triton, which the dev extra installs on Linux x86-64: its kernels are not tested",
)

from server.model.triton_lora import TritonKernel  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS: list[GatheredKernel] = [TorchKernel(), TritonKernel()]
NAMES = [kernel.name for kernel in KERNELS]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest ||gathered - per row|| / ||per row||, which is float64. The interpreter rounds to bfloat16 by
cutting off."""
IN, OUT = 75, 40
"""Neither is a multiple of a tile."""


@dataclass(frozen=True)
class Adapter:
    """What one slot holds for one module."""

    rank: int
    bias: bool = False
    gain: bool = False

    def weights(
        self, dtype: torch.dtype, seed: int, in_features: int = IN, out_features: int = OUT
    ) -> LoraWeights:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, std: float = 0.3) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(DEVICE, dtype)

        return LoraWeights(
            lora_A=draw(self.rank, in_features, std=in_features**-0.5),
            lora_B=draw(out_features, self.rank),
            scaling=1.5 + seed,
            bias=draw(out_features) if self.bias else None,
            gain=1 + draw(out_features) if self.gain else None,
        )


def linear_target(out_features: int = OUT, *, layer_idx: int = 0) -> Target:
    return Target(nn.Linear(IN, out_features), layer_idx, "linear", IN, out_features)


def one_module(
    weights: dict[int, LoraWeights], num_slots: int, in_features: int = IN
) -> SharedInput:
    target = Target(nn.Linear(in_features, OUT), 0, "linear", in_features, OUT)
    like = torch.empty(0, dtype=next(iter(weights.values())).lora_A.dtype, device=DEVICE)
    group = SharedInput([target], num_slots, like)
    for slot, lora in weights.items():
        group.put(0, slot, lora)
    return group


def rows(*pairs: tuple[int, int]) -> Rows:
    slots, depths = zip(*pairs, strict=True)
    return Rows(
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        torch.tensor(depths, dtype=torch.int32, device=DEVICE),
    )


LAYOUTS = {
    "one row": [(1, 2)],
    "one row of the base": [(-1, 0)],
    "every row the base": [(-1, 0)] * 19,
    "uneven, sorted": [(-1, 0)] * 3 + [(0, 4)] * 7 + [(0, 1)] * 2 + [(1, 3)] + [(3, 2)] * 21,
    "unsorted": [(slot, depth) for depth in (4, 1, 2, 0) for slot in (2, -1, 0, 3, 1)],
    "a slot each": [(slot, 4) for slot in range(4)],
    "no row reaches": [(0, 1), (1, 1), (3, 0)] * 6,
}
"""Slot and depth of each row, in layer 1. Slot 2 is empty."""
MIXES = {
    "plain": {0: Adapter(8), 1: Adapter(8), 3: Adapter(8)},
    "ranks": {0: Adapter(3), 1: Adapter(40), 3: Adapter(16)},
    "kinds": {0: Adapter(4, bias=True), 1: Adapter(4), 3: Adapter(8, gain=True)},
    "dora with bias": {
        0: Adapter(4, bias=True, gain=True),
        1: Adapter(4, gain=True),
        3: Adapter(4),
    },
}


@contextmanager
def memory_of_nobody_is_nan() -> Iterator[None]:
    """What is allocated and never written shows."""
    torch.use_deterministic_algorithms(True)  # type: ignore[no-untyped-call]
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)  # type: ignore[no-untyped-call]


def check(
    kernel: GatheredKernel,
    weights: dict[int, LoraWeights],
    pairs: list[tuple[int, int]],
    *,
    layer_idx: int = 1,
    base_bias: bool = True,
    in_features: int = IN,
) -> None:
    dtype = next(iter(weights.values())).lora_A.dtype
    group = one_module(weights, 4, in_features)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(pairs), in_features, generator=generator).to(DEVICE, dtype)
    output = torch.randn(len(pairs), OUT, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(OUT, generator=generator).to(DEVICE, dtype) if base_bias else None
    exact = {
        slot: LoraWeights(
            lora.lora_A.double(), lora.lora_B.double(), lora.scaling,
            None if lora.bias is None else lora.bias.double(),
            None if lora.gain is None else lora.gain.double(),
        )
        for slot, lora in weights.items()
    }  # fmt: skip
    slots, depths = (list(column) for column in zip(*pairs, strict=True))
    expected = apply_per_row(
        output.double(), x.double(), slots, depths, layer_idx, exact,
        None if bias is None else bias.double(),
    )  # fmt: skip
    actual = output.clone()
    where = rows(*pairs)
    up = group.modules[0].up
    assert up is not None
    low_rank = kernel.shrink(x, group.down, where, layer_idx)
    kernel.expand(actual, low_rank, up, where, layer_idx, bias)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype]
    reached = [slot in weights and depth > layer_idx for slot, depth in pairs]
    is_reached = torch.tensor(reached, device=DEVICE)
    assert torch.equal(actual[~is_reached], output[~is_reached])  # to the last bit
    if up.gain is None:
        for width in (
            OUT,
            OUT + 8,
        ):  # all columns the module's, and some of a neighbour without LoRA
            with memory_of_nobody_is_nan():
                delta = kernel.delta(low_rank, up, where, layer_idx, width)
            sum_error = (output.double() + delta[:, :OUT] - expected).norm() / expected.norm()
            assert sum_error <= TOLERANCE[dtype]
            assert not delta[~is_reached].any()
            assert not delta[:, OUT:].any()
    if any(reached):  # an adapter that was left out would show
        changed = is_reached.nonzero()[:, 0]
        assert float((actual - output)[changed].float().norm(dim=1).min()) > 0.1


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_as_if_it_were_alone(
    layout: str, mix: str, base_bias: bool, kernel: GatheredKernel
) -> None:
    weights = {slot: a.weights(torch.float32, slot) for slot, a in MIXES[mix].items()}
    check(kernel, weights, LAYOUTS[layout], base_bias=base_bias)


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_ranks_and_dtypes(rank: int, dtype: torch.dtype, kernel: GatheredKernel) -> None:
    """With features enough for several parts of the input, whose sums are summed."""
    weights = {slot: Adapter(rank).weights(dtype, slot, 1100) for slot in (0, 1, 3)}
    check(kernel, weights, LAYOUTS["uneven, sorted"], in_features=1100)


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("place", ["lora_A", "lora_B"])
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered"
)  # numpy, of the interpreter's product
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_alone(
    place: str, kernel: GatheredKernel
) -> None:
    weights = {slot: Adapter(4).weights(torch.float32, slot) for slot in (0, 1)}
    group = one_module(weights, 4)
    up = group.modules[0].up
    assert up is not None
    tensor = group.down.lora_A[0] if place == "lora_A" else up.lora_B
    tensor[1] = torch.inf
    where = rows((0, 2), (1, 2), (0, 2), (-1, 0), (2, 2))
    output = torch.zeros(5, OUT, device=DEVICE)
    low_rank = kernel.shrink(torch.ones(5, IN, device=DEVICE), group.down, where, 1)
    kernel.expand(output, low_rank, up, where, 1, None)
    assert output.isfinite().all(dim=1).tolist() == [True, False, True, True, True]


def test_a_rows_result_is_the_same_in_every_batch() -> None:
    """To the last bit: parts are summed in one order, whatever runs beside them. Compared are first rows
    of a tile, as numpy, which multiplies in the interpreter, goes by places in a matrix."""
    weights = {slot: Adapter(16).weights(torch.float32, slot, 1100) for slot in range(3)}
    group = one_module(weights, 4, 1100)
    up = group.modules[0].up
    assert up is not None
    x, kernel = torch.randn(40, 1100, device=DEVICE), TritonKernel()
    pairs = [(row % 3, 4) for row in range(40)]

    def run(first: int, end: int) -> Tensor:
        output = torch.zeros(end - first, OUT, device=DEVICE)
        where = rows(*pairs[first:end])
        low_rank = kernel.shrink(x[first:end], group.down, where, 0)
        kernel.expand(output, low_rank, up, where, 0, None)
        return output

    together = run(0, 40)
    for row in (0, 16, 32):
        assert torch.equal(run(row, row + 1)[0], together[row])


def test_modules_that_share_an_input_are_shrunk_at_once() -> None:
    like = torch.empty(0, device=DEVICE)
    group = SharedInput([linear_target(), linear_target(56), linear_target()], 3, like)
    for index, slot, rank in ((0, 0, 4), (0, 2, 8), (2, 2, 6)):  # module 1 has no adapter
        group.put(index, slot, Adapter(rank).weights(torch.float32, 10 * index + slot))
    x, where = torch.randn(9, IN, device=DEVICE), rows(*[(0, 1), (2, 1), (1, 1)] * 3)
    expected = TorchKernel().shrink(x, group.down, where, 0).sum(1)
    actual = TritonKernel().shrink(x, group.down, where, 0).sum(1)
    for index, slot in ((0, 0), (0, 2), (2, 2)):
        own = where.slots == slot
        torch.testing.assert_close(actual[index, own], expected[index, own])


WIDTHS = (40, 75, 24, 300)


def one_product(num_slots: int) -> SharedInput:
    """Four modules that are columns of one product, of which slots will target all but the third."""
    torch.manual_seed(0)
    linears = nn.ModuleList(nn.Linear(IN, width) for width in WIDTHS).to(DEVICE)
    members = [module for module in linears if isinstance(module, nn.Linear)]
    assert products.share(linears, [members]) == 1
    targets = [Target(m, 0, "linear", IN, m.out_features) for m in members]
    return SharedInput(targets, num_slots, torch.empty(0, device=DEVICE))


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_one_product_are_expanded_at_once(layout: str, kernel: GatheredKernel) -> None:
    group = one_product(4)
    held: dict[int, dict[int, LoraWeights]] = {index: {} for index in range(4)}
    for index, slot, adapter in (
        (3, 0, Adapter(8)), (0, 0, Adapter(4)), (0, 3, Adapter(4, bias=True)),
        (3, 3, Adapter(4, bias=True, gain=True)),
        (1, 1, Adapter(20, gain=True)),  # a new module and a wider rank: what was there has moved
        (0, 1, Adapter(9)),
    ):  # fmt: skip
        lora = adapter.weights(torch.float32, 10 * index + slot, out_features=WIDTHS[index])
        group.put(index, slot, lora)
        held[index][slot] = lora
    assert [part.module for part in group.up.parts] == [0, 1, 3]
    assert group.up.lora_B.shape[1] == sum(WIDTHS) - WIDTHS[2]  # nothing for who has no adapter
    pairs, base_bias = LAYOUTS[layout], group.product.bias
    x = torch.randn(len(pairs), IN, device=DEVICE)
    output = torch.randn(len(pairs), sum(WIDTHS), device=DEVICE)
    slots, depths = (list(column) for column in zip(*pairs, strict=True))
    expected = torch.cat([
        apply_per_row(own, x, slots, depths, 1, held[index], bias)
        for index, (own, bias) in enumerate(
            zip(output.split(WIDTHS, 1), base_bias.split(WIDTHS), strict=True)
        )
    ], dim=1)  # fmt: skip
    actual, where = output.clone(), rows(*pairs)
    kernel.expand(actual, kernel.shrink(x, group.down, where, 1), group.up, where, 1, base_bias)
    assert (actual - expected).norm() <= 2e-6 * expected.norm()
    is_same = expected == output
    assert torch.equal(actual[is_same], output[is_same])


# ---------------------------------------------------------------- stacks


@pytest.mark.parametrize(("rank", "width"), [(1, 8), (8, 8), (9, 16), (200, 256), (300, 512)])
def test_a_stack_is_as_wide_as_the_next_of_few_widths(rank: int, width: int) -> None:
    assert stack_rank(rank) == width
    assert list(RANKS) == sorted(set(RANKS))


class Layer(nn.Module):
    """Modules as a decoder layer has them: three that are given one tensor, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, OUT) for _ in range(3))
        self.o_proj = nn.Linear(OUT, IN)

    def forward(self, x: Tensor, *, is_copied: bool = False) -> list[Tensor]:
        parts = [
            module(x.clone() if is_copied else x)
            for module in (self.q_proj, self.k_proj, self.v_proj)
        ]
        return [*parts, self.o_proj(parts[0])]


class Counting(TorchKernel):
    """How often each half is called."""

    def __init__(self) -> None:
        self.num_shrunk = self.num_expanded = 0

    def shrink(self, *args):
        self.num_shrunk += 1
        return super().shrink(*args)

    def expand(self, *args) -> None:
        self.num_expanded += 1
        super().expand(*args)


class Bench:
    """A hooked layer with three slots, and one beside them."""

    def __init__(self, *, is_product: bool = False) -> None:
        self.layer = Layer().to(DEVICE)
        if is_product:
            layer = self.layer
            products.share(layer, [[layer.q_proj, layer.k_proj, layer.v_proj]])
        self.targets = {
            name: Target(module, 0, "linear", module.in_features, module.out_features)
            for name, module in self.layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        self.kernel = Counting()
        self.slots = GatheredSlots(self.targets, 3, torch.float32, DEVICE, self.kernel)
        self.hooks = LoraHooks(1, gathered=self.slots)

    def load(self, slot: int, rank: int, *names: str) -> None:
        weights = {}
        for name in names:
            module = self.targets[name].module
            lora = LoraWeights(
                torch.randn(rank, module.in_features, device=DEVICE) * 0.1,
                torch.randn(module.out_features, rank, device=DEVICE) * 0.3,
                scaling=0.5 + slot,
            )
            weights[name] = module, 0, lora
        self.hooks.load(slot, weights)
        self.hooks.install(1)

    def run(
        self, pairs: list[tuple[int, int]], **options: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the hooked layer puts out, and what it should."""
        x = torch.randn(len(pairs), IN, device=DEVICE)
        step = GatheredStep(self.slots, rows(*pairs), 1)
        with torch.inference_mode():
            with context.step(context.StepContext(AttentionProbe(), step)):
                actual = self.layer(x, **options)
            expected = []
            for name, module in self.layer.named_children():
                given = x if name != "o_proj" else actual[0]
                assert isinstance(module, nn.Linear)
                expected.append(
                    apply_per_row(
                        nn.functional.linear(given, module.weight, module.bias), given,
                        *(list(column) for column in zip(*pairs, strict=True)), 0,
                        {s: w for s in range(4) if (w := self.hooks.weights(s).get(name))}, None,
                    )
                )  # fmt: skip
        return actual, expected


@pytest.fixture(params=[False, True], ids=["each alone", "one product"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    torch.manual_seed(0)
    made = Bench(is_product=request.param)
    yield made
    made.hooks.install(0)
    assert made.hooks.num_installed == 0


MIXED = [(0, 1), (-1, 0), (1, 1), (2, 1), (1, 0), (2, 1)]


def same(parts: tuple[list[Tensor], list[Tensor]]) -> bool:
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(*parts, strict=True))


def test_neighbours_with_one_input_are_shrunk_once(bench: Bench) -> None:
    for slot in range(3):
        bench.load(slot, 4, *bench.targets)
    assert same(bench.run(MIXED))
    is_product = bench.slots.find("q_proj").group.product is not None
    expected = (2, 2 if is_product else 4)
    assert (bench.kernel.num_shrunk, bench.kernel.num_expanded) == expected


def test_whoever_of_a_product_comes_first_adapts_for_all(bench: Bench) -> None:
    """Also where not all are targeted, and where a reader asks twice, for which all is made anew."""
    bench.load(0, 4, "v_proj", "q_proj")
    bench.load(1, 9, "k_proj")
    assert same(bench.run(MIXED))
    layer, x = bench.layer, torch.randn(len(MIXED), IN, device=DEVICE)
    step = GatheredStep(bench.slots, rows(*MIXED), 1)
    with torch.inference_mode(), context.step(context.StepContext(AttentionProbe(), step)):
        value, query, again = layer.v_proj(x), layer.q_proj(x), layer.v_proj(x)
        expected = layer(x)
    torch.testing.assert_close(value, expected[2])
    torch.testing.assert_close(query, expected[0])
    torch.testing.assert_close(again, expected[2])
    assert same(bench.run(MIXED))


def test_neighbours_with_inputs_of_their_own_are_not(bench: Bench) -> None:
    """The names say that they may share; what they are given decides."""
    bench.load(0, 4, *bench.targets)
    assert same(bench.run([(0, 1)] * 3, is_copied=True))
    assert bench.kernel.num_shrunk == 4


def test_adapters_come_and_go_and_grow(bench: Bench) -> None:
    bench.load(0, 4, "q_proj", "v_proj")
    bench.load(1, 20, "k_proj")  # the group's stack moves
    bench.load(2, 4, "o_proj", "q_proj")
    assert same(bench.run(MIXED))
    bench.hooks.unload(0)
    assert same(bench.run(MIXED))
    bench.load(0, 9, "q_proj")  # narrower than the stack: what was there must be gone
    assert same(bench.run(MIXED))
    bench.load(3, 4, *bench.targets)  # beside the stacks: for work that is no request
    assert same(bench.run(MIXED))
    assert 3 not in bench.slots.find("q_proj").slots


def test_weights_are_held_once(bench: Bench) -> None:
    """What a slot is said to hold lies in the stacks, also after these moved."""
    bench.load(0, 4, *bench.targets)
    bench.load(1, 30, "q_proj")
    for name, lora in bench.hooks.weights(0).items():
        module = bench.slots.find(name)
        assert module is not None
        assert module.up is not None
        stacks = (module.group.down.lora_A, module.up.lora_B)
        for tensor, stack in zip((lora.lora_A, lora.lora_B), stacks, strict=True):
            assert tensor.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


def test_a_signature_changes_with_what_a_step_reads(bench: Bench) -> None:
    assert bench.slots.signature(1) == ()
    bench.load(0, 4, "q_proj")
    first = bench.slots.signature(1)
    assert [name for name, _ in first] == ["q_proj"]
    assert bench.slots.signature(0) == ()
    bench.load(1, 8, "q_proj")
    assert bench.slots.signature(1) == first  # another adapter in the same stacks
    bench.hooks.unload(0)
    bench.load(0, 3, "q_proj")
    assert bench.slots.signature(1) == first
    bench.load(2, 9, "q_proj")
    wider = bench.slots.signature(1)
    assert wider != first
    bench.load(2, 9, "q_proj", "o_proj")
    assert bench.slots.signature(1) != wider
    for slot in range(3):
        bench.hooks.unload(slot)
    assert bench.slots.signature(1) == ()


def test_a_module_that_does_not_see_every_row_carries_no_adapter(bench: Bench) -> None:
    bench.load(0, 4, "q_proj")
    step = GatheredStep(bench.slots, rows((0, 1), (0, 1)), 1)
    with (
        context.step(context.StepContext(AttentionProbe(), step)),
        torch.no_grad(),
        pytest.raises(ModelError, match="q_proj was called with 3 rows in a step of 2"),
    ):
        bench.layer.q_proj(torch.zeros(3, IN, device=DEVICE))


# ---------------------------------------------------------------- the compiler


def test_all_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """In a process of its own, as this one interprets."""
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py")],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(kernels) == 13
    for kernel in kernels:
        is_fetch = kernel["name"] == "_fetch"
        assert kernel["is_bulk"] == is_fetch, kernel
        assert kernel["overlaps"] == (kernel["capability"] >= 90 and not is_fetch), kernel
        assert kernel["shared_bytes"] <= 99 << 10, kernel  # what every GPU since Ampere has
        assert kernel["is_matrix"] == (kernel["dtype"] == "bf16" and not is_fetch), kernel
