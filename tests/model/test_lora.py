"""The hooks: the fast kernel against the plain one, PEFT, and the cost of doing nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.errors import ModelError
from server.model import context
from server.model.attention_probe import AttentionProbe
from server.model.batch import BatchedSequence
from server.model.checkpoint import read_checkpoint
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import (
    LoraStep,
    LoraWeights,
    Segment,
    apply_embedding,
    apply_grouped,
    apply_per_row,
)
from server.model.runner import ModelRunner
from tests.parity.adapters import save_adapter
from tests.parity.oracle import Oracle
from tests.parity.zoo import BY_NAME, NUM_LAYERS, random_prompt, save_model
from tests.tiny import Tiny, load_tiny, num_hooks

IN, OUT = 24, 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest ||grouped - per row|| / ||per row||, by dtype: they round in another order."""
PROMPT = random_prompt(11, seed=3)


def rows_of(*sequences: tuple[int, int, int], num_logits: int = 1) -> list[BatchedSequence]:
    """(slot, depth, num_tokens) each, in the runner's order."""
    return [
        BatchedSequence([1] * num_tokens, 0, [0] * num_tokens, slot, depth, num_logits)
        for slot, depth, num_tokens in sequences
    ]


def draw_weights(
    rank: int, dtype: torch.dtype, seed: int, *, bias: bool = False, gain: bool = False
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    return LoraWeights(
        lora_A=draw(rank, IN),
        lora_B=draw(OUT, rank),
        scaling=1.5 + seed,
        bias=draw(OUT) if bias else None,
        gain=1 + draw(OUT) if gain else None,
    )


UNEVEN = rows_of((-1, 0, 2), (0, 4, 5), (0, 2, 1), (0, 1, 3), (1, 3, 1), (2, 4, 7), (2, 4, 2))
"""Slot 2 targets nothing here."""


# ---------------------------------------------------------------- the kernel


@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_grouped_rows_are_as_if_each_were_alone(
    rank: int, dtype: torch.dtype, bias: bool, gain: bool, base_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(len(sequence.token_ids) for sequence in UNEVEN)
    x = torch.randn(num_rows, IN, generator=generator).to(dtype)
    output = torch.randn(num_rows, OUT, generator=generator).to(dtype)
    own_bias = torch.randn(OUT, generator=generator).to(dtype) if base_bias else None
    weights = {
        0: draw_weights(rank, dtype, 0, bias=bias, gain=gain),
        1: draw_weights(2 * rank, dtype, 1, bias=bias),
    }
    slots = [s.slot for s in UNEVEN for _ in s.token_ids]
    depths = [s.depth for s in UNEVEN for _ in s.token_ids]
    step = LoraStep.build(UNEVEN, NUM_LAYERS)
    assert step is not None
    for layer_idx in range(NUM_LAYERS):
        expected = apply_per_row(output, x, slots, depths, layer_idx, weights, own_bias)
        grouped = output.clone()
        apply_grouped(grouped, x, step.segments[layer_idx], weights, own_bias)
        change = (expected - output).float().norm()
        error = (grouped - expected).float().norm()
        assert error <= TOLERANCE[dtype] * expected.float().norm()
        is_reached = [
            slot in weights and depth > layer_idx for slot, depth in zip(slots, depths, strict=True)
        ]
        assert any(is_reached) == (float(change) > 0)
        untouched = ~torch.tensor(is_reached)
        assert torch.equal(grouped[untouched], output[untouched])  # to the last bit


def test_the_plain_formula_is_the_documented_one() -> None:
    """In float64, written out with matrices: what both kernels stand on."""
    x, w = torch.randn(3, IN).double(), torch.randn(OUT, IN).double()
    base_bias = torch.randn(OUT).double()
    output = x @ w.T + base_bias
    lora = draw_weights(4, torch.float64, 0, bias=True)
    args = ([0] * 3, [1] * 3, 0, {0: lora}, base_bias)
    delta = lora.scaling * (x @ lora.lora_A.T @ lora.lora_B.T + lora.bias)
    assert torch.allclose(apply_per_row(output, x, *args), output + delta)

    magnitude = torch.rand(OUT).double() + 0.5
    dora = draw_weights(4, torch.float64, 0)
    merged = w + dora.scaling * dora.lora_B @ dora.lora_A
    gain = magnitude / merged.norm(dim=1)
    dora = LoraWeights(dora.lora_A, dora.lora_B, dora.scaling, gain=gain)
    expected = x @ (gain.unsqueeze(1) * merged).T + base_bias
    actual = apply_per_row(output, x, [0] * 3, [1] * 3, 0, {0: dora}, base_bias)
    assert torch.allclose(actual, expected)
    without = apply_per_row(output - base_bias, x, [0] * 3, [1] * 3, 0, {0: dora}, None)
    assert torch.allclose(without, expected - base_bias)


def test_an_embeddings_delta_is_a_column_of_A() -> None:
    token_ids = torch.tensor([3, 0, 23, 3, 5])
    lora = draw_weights(4, torch.float32, 0)
    output = torch.randn(5, OUT)
    expected = output.clone()
    one_hot = torch.eye(IN)[token_ids[1:4]]
    expected[1:4] += 0.5 * lora.scaling * one_hot @ lora.lora_A.T @ lora.lora_B.T
    apply_embedding(output, token_ids, [Segment(0, 1, 4), Segment(9, 4, 5)], {0: lora}, 0.5)
    assert torch.allclose(output, expected, atol=1e-6)


# ---------------------------------------------------------------- the step's rows


def test_each_layer_sees_the_rows_that_reach_it() -> None:
    step = LoraStep.build(UNEVEN, NUM_LAYERS)
    assert step is not None
    assert (step.num_rows, step.max_depth) == (21, 4)
    assert [list(rows) for rows in step.segments] == [
        [Segment(0, 2, 11), Segment(1, 11, 12), Segment(2, 12, 21)],
        [Segment(0, 2, 8), Segment(1, 11, 12), Segment(2, 12, 21)],
        [Segment(0, 2, 7), Segment(1, 11, 12), Segment(2, 12, 21)],
        [Segment(0, 2, 7), Segment(2, 12, 21)],
    ]
    assert step.embedding_segments == step.segments[0]
    # One row of logits each: of seven, those of full depth.
    assert step.num_head_rows == 7
    assert list(step.head_segments) == [Segment(0, 1, 2), Segment(2, 5, 7)]


def test_a_step_ends_at_its_largest_depth() -> None:
    assert LoraStep.build(rows_of((-1, 0, 3), (-1, 0, 1)), NUM_LAYERS) is None
    assert LoraStep.build([], NUM_LAYERS) is None
    step = LoraStep.build(rows_of((-1, 0, 3), (0, 2, 1)), NUM_LAYERS)
    assert step is not None
    assert len(step.segments) == 2
    assert list(step.head_segments) == []


def test_rows_without_logits_are_no_rows_of_the_head() -> None:
    batch = [*rows_of((0, 4, 3), num_logits=0), *rows_of((0, 4, 2), num_logits=2)]
    step = LoraStep.build(batch, NUM_LAYERS)
    assert step is not None
    assert (step.num_head_rows, list(step.head_segments)) == (2, [Segment(0, 0, 2)])


# ---------------------------------------------------------------- hooks on a model


@dataclass
class Bench:
    """A runner over one model, with adapters read straight into slots."""

    tiny: Tiny
    runner: ModelRunner

    def load(self, uid: int, path: Path) -> int:
        slot = self.runner.slots.acquire(uid, read_checkpoint(path, self.tiny.targets))
        assert slot is not None
        return slot

    def logits(self, slot: int, depth: int, num_logits: int | None = None) -> Tensor:
        """The prompt's logits, `[num_logits, vocab_size]`; of every token by default."""
        return self.run((slot, depth), num_logits=num_logits)

    def run(self, *rows: tuple[int, int], num_logits: int | None = None) -> Tensor:
        size = self.runner.cache.block_size
        num_blocks = -(-len(PROMPT) // size)
        batch = [
            BatchedSequence(
                token_ids=list(PROMPT),
                start=0,
                block_table=list(range(index * num_blocks, (index + 1) * num_blocks)),
                slot=slot,
                depth=depth,
                num_logits=len(PROMPT) if num_logits is None else num_logits,
            )
            for index, (slot, depth) in enumerate(rows)
        ]
        return self.runner.run(batch)[0]


def make_bench(tiny: Tiny) -> Bench:
    model = tiny.base.model
    cache = KVCache(tiny.base.kv_specs, 16, 4, model.dtype, model.device)
    return Bench(tiny, ModelRunner(model, cache, tiny.targets, max_loras=3))


@pytest.fixture
def bench(tiny: Tiny) -> Iterator[Bench]:
    made = make_bench(tiny)
    yield made
    made.runner.close()
    assert num_hooks(tiny.base.model) == 0


class OpCounter(TorchDispatchMode):
    """How often each operator of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def ops_of(step: Callable[[], Any]) -> list[str]:
    with OpCounter() as counter:
        step()
    return counter.ops


def test_a_base_step_costs_what_it_did_before_any_adapter(tiny: Tiny, bench: Bench) -> None:
    before = ops_of(lambda: bench.logits(-1, 0))
    plain = bench.logits(-1, 0)
    slot = bench.load(1, tiny.adapter("a"))
    bench.logits(slot, NUM_LAYERS)
    assert num_hooks(tiny.base.model) == 7 * NUM_LAYERS
    assert ops_of(lambda: bench.logits(-1, 0)) == before
    assert num_hooks(tiny.base.model) == 0
    assert torch.equal(bench.logits(-1, 0), plain)


def test_work_grows_by_the_layer_and_ends_at_the_steps_depth(tiny: Tiny, bench: Bench) -> None:
    slot = bench.load(1, tiny.adapter("a"))
    num_ops = []
    for depth in range(NUM_LAYERS + 1):
        num_ops.append(len(ops_of(lambda depth=depth: bench.run((-1, 0), (slot, depth)))))
        assert num_hooks(tiny.base.model) == 7 * depth
        hooked = {
            tiny.targets[name].layer_idx
            for name, module in tiny.base.model.named_modules()
            if module._forward_hooks
        }
        assert hooked == set(range(depth))
    per_layer = {after - before for before, after in pairwise(num_ops)}
    assert len(per_layer) == 1
    assert min(per_layer) > 0


def test_a_layer_that_no_adapter_targets_has_no_hook(tiny: Tiny, bench: Bench) -> None:
    slot = bench.load(1, tiny.adapter("shallow"))  # layers 0 and 2
    num_ops = [len(ops_of(lambda d=depth: bench.logits(slot, d))) for depth in range(4)]
    assert num_ops[0] < num_ops[1] == num_ops[2] < num_ops[3]
    assert num_hooks(tiny.base.model) == 7 * 2


def test_a_slot_that_is_emptied_leaves_no_hook(tiny: Tiny, bench: Bench) -> None:
    bench.logits(bench.load(1, tiny.adapter("a")), NUM_LAYERS)
    bench.runner.slots.release(1)
    bench.runner.close()
    assert num_hooks(tiny.base.model) == 0


def test_a_step_that_raises_leaves_the_next_as_it_should_be(
    tiny: Tiny, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bench.logits(-1, 0)
    slot = bench.load(1, tiny.adapter("a"))
    with monkeypatch.context() as patch:
        patch.setattr(tiny.base.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.logits(slot, NUM_LAYERS)
    with pytest.raises(LookupError):
        context.current()
    assert torch.equal(bench.logits(-1, 0), base)
    assert num_hooks(tiny.base.model) == 0


def test_rows_of_a_batch_do_not_touch_each_other(tiny: Tiny, bench: Bench) -> None:
    a, b = bench.load(1, tiny.adapter("a")), bench.load(2, tiny.adapter("c"))
    rows = [(-1, 0), (a, 4), (a, 1), (b, 2)]
    mixed = bench.run(*rows, num_logits=1)
    order = sorted(rows, key=lambda row: (row[0], -row[1]))
    for row, logits in zip(order, mixed, strict=True):
        alone = bench.run(row, num_logits=1)[0]
        assert torch.allclose(logits, alone, atol=1e-5)
    distances = torch.cdist(mixed, mixed)
    assert float(distances[~torch.eye(4, dtype=torch.bool)].min()) > 0.1


def test_without_the_depth_mask_the_rows_differ(
    tiny: Tiny, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for all that compares depths."""
    slot = bench.load(1, tiny.adapter("a"))
    right = bench.run((slot, 4), (slot, 1), num_logits=1)[1]
    build = LoraStep.build

    def unmasked(batch: list[BatchedSequence], num_layers: int) -> LoraStep | None:
        deep = [
            BatchedSequence(s.token_ids, s.start, s.block_table, s.slot, 4, s.num_logits)
            for s in batch
        ]
        return build(deep, num_layers)

    monkeypatch.setattr(LoraStep, "build", unmasked)
    wrong = bench.run((slot, 4), (slot, 1), num_logits=1)[1]
    assert not torch.allclose(wrong, right, atol=1e-2)


def test_a_module_that_does_not_see_every_token_carries_no_adapter() -> None:
    """A router that sends a module some of the rows would give it another row's adapter."""
    hooks = LoraHooks(NUM_LAYERS)
    module = nn.Linear(IN, OUT)
    hooks.load(0, {"part": (module, 0, draw_weights(2, torch.float32, 0))})
    hooks.install(1)
    step = context.StepContext(AttentionProbe(), LoraStep.build(rows_of((0, 1, 3)), NUM_LAYERS))
    with context.step(step), torch.no_grad():
        assert module(torch.zeros(3, IN)).shape == (3, OUT)
        with pytest.raises(ModelError, match="part was called with 2 rows in a step of 3"):
            module(torch.zeros(2, IN))
    hooks.install(0)
    assert hooks.num_installed == 0


# ---------------------------------------------------------------- kinds of modules


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("llama", "lm_head"),
        ("llama", "lm_head_and_low_layers"),
        ("llama", "embedding"),
        ("llama", "lora_bias"),
        ("qwen2", "dora"),
        ("gpt2", "dora"),
        ("gemma3", "embedding"),
    ],
)
def test_every_kind_of_module_is_as_in_peft(
    tmp_path: Path, architecture: str, variant: str
) -> None:
    """`qwen2` has DoRA with and without a bias below, `gpt2` on Conv1D, `gemma3` a scaled embedding."""
    model = save_model(BY_NAME[architecture], tmp_path / "model")
    adapter = save_adapter(BY_NAME[architecture], variant, tmp_path / "adapters" / "x")
    oracle = Oracle(model, adapter)
    bench = make_bench(load_tiny(model, adapter.parent))
    slot = bench.load(1, adapter)
    for depth in range(NUM_LAYERS + 1):
        logits = bench.logits(slot, depth)
        assert torch.allclose(logits, oracle.logits(PROMPT, depth), atol=1e-4), depth
    bench.runner.close()


def test_the_output_matrix_is_adapted_at_full_depth_alone(tmp_path: Path) -> None:
    adapter = save_adapter(BY_NAME["llama"], "lm_head_and_low_layers", tmp_path / "x")
    model = save_model(BY_NAME["llama"], tmp_path / "model")
    bench = make_bench(load_tiny(model, tmp_path))
    slot = bench.load(1, adapter)
    head = bench.tiny.base.model.lm_head
    two, three = (bench.logits(slot, depth) for depth in (2, 3))
    assert not head._forward_hooks
    full = bench.logits(slot, 4)
    assert head._forward_hooks
    bench.logits(-1, 0)
    assert num_hooks(bench.tiny.base.model) == 0
    assert torch.equal(two, three)  # its last layer is 1
    assert not torch.allclose(two, full, atol=0.1)
    # As many rows of the head as logits are wanted, whichever tokens they belong to.
    assert torch.allclose(bench.logits(slot, 4, num_logits=1), full[-1:], atol=1e-5)
    assert bench.logits(slot, 4, num_logits=0).shape == (0, full.shape[1])
    bench.runner.close()


def test_a_forward_pass_outside_of_a_step_meets_the_base_model() -> None:
    module = torch.nn.Linear(3, 2)
    hooks = LoraHooks(num_layers=1)
    weights = LoraWeights(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    x = torch.ones(1, 1, 3)
    base = module(x)
    hooks.load(0, {"m": (module, 0, weights)})
    hooks.install(1)
    assert hooks.num_installed == 1
    assert torch.equal(module(x), base)
    lora = LoraStep.build([BatchedSequence([1], 0, [0], 0, 1, 1)], 1)
    with context.step(context.StepContext(AttentionProbe(), lora)):
        assert torch.allclose(module(x), base + 3)
