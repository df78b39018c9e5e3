"""The compiled LoRA kernel against the plain formula, row by row."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.errors import ModelError
from server.model import context, packed
from server.model import hooks as hooks_module
from server.model.attention_probe import AttentionProbe
from server.model.batch import BatchedSequence
from server.model.hooks import LoraHooks
from server.model.lora import LoraStep, LoraWeights, apply_per_row
from server.model.native.library import Library, load
from server.model.native.lora import NativeLora, Part, Scratch
from server.model.segments import ReachedRows, Segment
from tests.model.test_lora import TOLERANCE, rows_of

NUM_SLOTS = 19
NUM_LAYERS = 4

LAYOUTS = {
    "one row each": rows_of(*((slot, 4, 1) for slot in range(NUM_SLOTS))),
    "uneven": rows_of(*((slot, 4, 1 + slot % 7) for slot in range(NUM_SLOTS))),
    "depths": rows_of(*((slot, d, 1) for slot in range(6) for d in (4, 3, 1))),
    "base rows first": rows_of((-1, 0, 3), (0, 4, 1), (1, 4, 1), (2, 2, 1)),
    "long among short": rows_of((0, 4, 1), (1, 4, 71), (2, 4, 1), (18, 4, 5)),
    "nobody reaches": rows_of((-1, 0, 3), (0, 1, 2)),
}
KINDS = {
    "plain": lambda slot: {},
    "bias": lambda slot: {"bias": True},
    "dora": lambda slot: {"gain": True},
    "mixed": lambda slot: {"bias": slot % 3 == 0, "gain": slot % 2 == 0},
}
SHAPES = {"even": (32, 512, 16), "odd": (100, 77, 5), "tiny": (3, 2, 1), "wide": (64, 300, 40)}
"""in_features, out_features, rank."""


def library() -> Library:
    found = load()
    assert isinstance(found, Library), found
    return found


def draw(shape: tuple[int, int, int], slot: int, dtype: torch.dtype, **kind: bool) -> LoraWeights:
    num_in, num_out, rank = shape
    generator = torch.Generator().manual_seed(slot)

    def tensor(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.3).to(dtype)

    return LoraWeights(
        tensor(rank + slot % 2, num_in),
        tensor(num_out, rank + slot % 2),
        0.5 + slot / 8,
        bias=tensor(num_out) if kind.get("bias") else None,
        gain=1 + tensor(num_out) if kind.get("gain") else None,
    )


def scratch(num_threads: int) -> Scratch:
    made = Scratch()
    made.num_threads = num_threads
    return made


def segments(sequences: list[BatchedSequence], layer_idx: int) -> ReachedRows:
    step = LoraStep.build(sequences, NUM_LAYERS)
    assert step is not None
    return step.segments[layer_idx] if layer_idx < len(step.segments) else ReachedRows()


def inputs(shape: tuple[int, int, int], num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_rows, shape[0], generator=generator).to(dtype)
    return x, torch.randn(num_rows, shape[1], generator=generator).to(dtype)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_as_if_it_were_alone(
    layout: str, kind: str, shape: str, dtype: torch.dtype, num_threads: int
) -> None:
    sequences, size = LAYOUTS[layout], SHAPES[shape]
    weights = {
        slot: draw(size, slot, dtype, **KINDS[kind](slot))
        for slot in range(NUM_SLOTS)
        if slot != 2  # this one does not target the module
    }
    slots = [s.slot for s in sequences for _ in s.token_ids]
    depths = [s.depth for s in sequences for _ in s.token_ids]
    x, output = inputs(size, len(slots), dtype)
    base_bias = output[0].clone()
    expected = apply_per_row(output, x, slots, depths, 1, weights, base_bias)
    actual = output.clone()
    kernel = NativeLora(library(), [Part(weights, base_bias)])
    kernel.apply(actual, x, segments(sequences, 1), scratch(num_threads))
    error = (actual - expected).float().norm()
    assert error <= TOLERANCE[dtype] * expected.float().norm()
    change = (expected - output).float().norm()
    assert error <= 0.1 * change  # an adapter that was left out would show
    is_reached = torch.tensor([d > 1 and s in weights for s, d in zip(slots, depths, strict=True)])
    assert torch.equal(actual[~is_reached], output[~is_reached])


def test_neighbours_and_threads_change_no_bit_of_a_row() -> None:
    size = SHAPES["wide"]
    weights = {slot: draw(size, slot, torch.float32) for slot in range(4)}
    kernel = NativeLora(library(), [Part(weights, None)])
    x, output = inputs(size, 40, torch.float32)
    together = output.clone()
    rows = ReachedRows([Segment(0, 0, 33), Segment(1, 33, 34), Segment(3, 34, 40)])
    kernel.apply(together, x, rows, scratch(3))
    for segment in rows:
        for row in range(segment.start, segment.end):
            alone = output[row : row + 1].clone()
            kernel.apply(
                alone, x[row : row + 1], ReachedRows([Segment(segment.slot, 0, 1)]), scratch(1)
            )
            assert torch.equal(alone[0], together[row])


def test_rows_may_be_part_of_wider_ones() -> None:
    """As the outputs of products that were made as one are."""
    size = SHAPES["even"]
    weights = {0: draw(size, 0, torch.float32)}
    x, output = inputs(size, 6, torch.float32)
    wide = torch.zeros(6, 3 * size[1])
    part = wide[:, size[1] : 2 * size[1]]
    part.copy_(output)
    rows = ReachedRows([Segment(0, 0, 6)])
    kernel = NativeLora(library(), [Part(weights, None)])
    kernel.apply(output, x, rows, scratch(2))
    kernel.apply(part, x, rows, scratch(2))
    assert torch.equal(part, output)
    assert not wide[:, : size[1]].any()
    assert not wide[:, 2 * size[1] :].any()


def shared_hooks() -> tuple[list[nn.Linear], LoraHooks, list[nn.Linear]]:
    """Three Linears of one product with LoRA in the hooks, and the plain ones."""
    torch.manual_seed(0)
    plain = [nn.Linear(32, width) for width in (48, 24, 36)]
    model = nn.ModuleList(copy.deepcopy(plain))
    members = [module for module in model if isinstance(module, nn.Linear)]
    packed.pack(model, [members])
    hooks = LoraHooks(NUM_LAYERS)
    sizes = [(32, linear.out_features, 4 + i) for i, linear in enumerate(plain)]
    for slot, targeted in enumerate(((0, 1, 2), (2,), (1, 2), (0,))):
        hooks.load(
            slot,
            {
                f"m{i}": (
                    members[i],
                    1,
                    draw(sizes[i], slot, torch.float32, gain=slot == 2),
                )
                for i in targeted
            },
        )
    hooks.install(NUM_LAYERS)
    return members, hooks, plain


SHARED = rows_of((-1, 0, 2), (0, 4, 3), (1, 4, 1), (2, 4, 2), (3, 4, 5), (3, 1, 2))


def shared_outputs(
    members: list[nn.Linear], order: tuple[int, ...], hooks: LoraHooks, *, is_observed: bool = False
) -> dict[int, Tensor]:
    num_rows = sum(len(s.token_ids) for s in SHARED)
    x = torch.randn(1, num_rows, 32, generator=torch.Generator().manual_seed(1))
    plan = LoraStep.build(SHARED, NUM_LAYERS)
    assert plan is not None
    if is_observed:
        plan = replace(plan, is_observed=True)
    with context.step(context.StepContext(AttentionProbe(), plan)), torch.inference_mode():
        return {index: members[index](x).clone() for index in order}


def test_modules_of_one_product_are_adapted_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    members, hooks, plain = shared_hooks()
    num_calls = 0
    real = NativeLora.apply

    def counting(self: NativeLora, *args: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        real(self, *args)

    monkeypatch.setattr(NativeLora, "apply", counting)
    actual = shared_outputs(members, (0, 1, 2), hooks)
    assert num_calls == 1
    slots = [s.slot for s in SHARED for _ in s.token_ids]
    depths = [s.depth for s in SHARED for _ in s.token_ids]
    x = torch.randn(1, len(slots), 32, generator=torch.Generator().manual_seed(1))
    for index, module in enumerate(plain):
        weights = hooks._modules[f"m{index}"].weights
        base = module(x)[0].detach()
        expected = apply_per_row(base, x[0], slots, depths, 1, weights, module.bias.detach())
        assert torch.allclose(actual[index][0], expected, atol=1e-5)
        assert not torch.allclose(actual[index][0], base, atol=1e-2)
    hooks.install(0)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 2), (1,), (2, 0, 1)])
def test_in_whatever_order_they_are_called(order: tuple[int, ...]) -> None:
    members, hooks, _ = shared_hooks()
    expected = shared_outputs(members, (0, 1, 2), hooks)
    actual = shared_outputs(members, order, hooks)
    again = shared_outputs(members, order, hooks)  # whatever the last pass left half read
    for index in order:
        assert torch.equal(actual[index], expected[index])
        assert torch.equal(again[index], expected[index])
    hooks.install(0)


def test_who_watches_a_pass_sees_each_module_by_itself() -> None:
    members, hooks, _ = shared_hooks()
    expected = shared_outputs(members, (0, 1, 2), hooks)
    actual = shared_outputs(members, (0, 1, 2), hooks, is_observed=True)
    assert all(torch.equal(actual[index], expected[index]) for index in range(3))
    hooks.install(0)


def test_another_adapters_nan_stays_its_own() -> None:
    size = SHAPES["wide"]
    weights = {slot: draw(size, slot, torch.float32) for slot in range(3)}
    weights[1].lora_A.fill_(torch.nan)
    x, output = inputs(size, 9, torch.float32)
    rows = ReachedRows([Segment(slot, 3 * slot, 3 * slot + 3) for slot in range(3)])
    NativeLora(library(), [Part(weights, None)]).apply(output, x, rows, scratch(2))
    is_finite = output.isfinite().all(dim=1)
    assert is_finite.tolist() == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, y: (x.double(), y),
        lambda x, y: (x, y.bfloat16()),
        lambda x, y: (x[:, 1:], y),
        lambda x, y: (x, y[:, 1:]),
        lambda x, y: (x[:5], y),
        lambda x, y: (x.t().contiguous().t(), y),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(spoil) -> None:  # type: ignore[no-untyped-def]
    size = SHAPES["even"]
    kernel = NativeLora(library(), [Part({0: draw(size, 0, torch.float32)}, None)])
    x, output = spoil(*inputs(size, 6, torch.float32))
    with pytest.raises(ModelError, match="is not what its weights are for: 32 to 512"):
        kernel.apply(output, x, ReachedRows([Segment(0, 0, 6)]), scratch(1))


def test_hooks_apply_it_and_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no library was compiled torch's operators give the same."""
    size, sequences = SHAPES["even"], LAYOUTS["uneven"]
    module = nn.Linear(*size[:2])
    outputs = []
    for reason in (None, "none was compiled"):
        if reason is not None:
            monkeypatch.setattr(hooks_module, "load", lambda found=reason: found)
        hooks = LoraHooks(NUM_LAYERS)
        for slot in range(NUM_SLOTS):
            hooks.load(slot, {"m": (module, 1, draw(size, slot, torch.float32))})
        assert (hooks._modules["m"].native is None) == (reason is not None)
        hooks.install(NUM_LAYERS)
        x, _ = inputs(size, sum(len(s.token_ids) for s in sequences), torch.float32)
        step = context.StepContext(AttentionProbe(), LoraStep.build(sequences, NUM_LAYERS))
        with context.step(step), torch.inference_mode():
            outputs.append(module(x))
        hooks.install(0)
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], module(x), atol=1e-2)
