"""Grouped products against the plain formula; torch has them on a CPU, too, only not fast."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import context, grouped_mm
from server.model.attention_probe import AttentionProbe
from server.model.batch import BatchedSequence
from server.model.checkpoint import read_checkpoint
from server.model.gathered import GatheredSlots
from server.model.grouped_mm import GroupedProducts, Grouping
from server.model.hooks import LoraHooks
from server.model.kv_cache import KVCache
from server.model.lora import LoraStep, LoraWeights, apply_per_row
from server.model.runner import ModelRunner
from server.model.segments import Segment
from server.model.targets import Target
from tests.model.test_lora import TOLERANCE, rows_of
from tests.parity.zoo import NUM_LAYERS, random_prompt
from tests.tiny import Tiny

CPU = torch.device("cpu")
IN, OUT, NUM_SLOTS = 24, 40, 4

LAYOUTS = {
    "prompts": rows_of((0, 4, 9), (1, 4, 30), (3, 4, 5)),
    "depths": rows_of((0, 4, 9), (0, 1, 3), (1, 3, 8), (3, 2, 5), (3, 1, 1)),
    "base among them": rows_of((-1, 0, 6), (0, 4, 9), (3, 4, 5)),
    "decodes, then prompts": rows_of((-1, 0, 1), (0, 4, 1), (3, 2, 1), (-1, 0, 5), (0, 4, 7), (1, 4, 6)),
    "a slot that targets nothing here": rows_of((0, 4, 9), (2, 4, 7), (3, 4, 5)),
    "one alone": rows_of((0, 4, 9)),
    "a slot beside the stacks": rows_of((0, 4, 9), (1, 4, 5), (4, 4, 6)),
}  # fmt: skip


def draw(slot: int, kind: str, dtype: torch.dtype, out_features: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(slot)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    rank = (4, 16, 8, 8, 4)[slot] if kind == "ranks" else 8
    is_special = slot == 1
    return LoraWeights(
        tensor(rank, IN),
        tensor(out_features, rank),
        scaling=0.5 + slot,
        bias=tensor(out_features) if kind == "bias" and is_special else None,
        gain=1 + tensor(out_features) if kind == "dora" and is_special else None,
    )


class Products(TorchDispatchMode):
    """How often groups are multiplied, and pairs of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.num_grouped = self.num_single = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.num_grouped += name == "_grouped_mm"
        self.num_single += name in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


class Bench:
    def __init__(self, kind: str, dtype: torch.dtype, out_features: int = OUT) -> None:
        self.module = nn.Linear(IN, out_features).to(dtype)
        targets = {"m": Target(self.module, 1, "linear", IN, out_features)}
        slots = GatheredSlots(targets, NUM_SLOTS, dtype, CPU)
        self.hooks = LoraHooks(4, gathered=slots, products=GroupedProducts(slots, CPU))
        self.weights = {slot: draw(slot, kind, dtype, out_features) for slot in (0, 1, 3, 4)}
        for slot, lora in self.weights.items():
            self.hooks.load(slot, {"m": (self.module, 1, lora)})
        self.hooks.install(4)
        self.counted = Products()

    def run(self, sequences: list[BatchedSequence]) -> tuple[Tensor, Tensor, Tensor]:
        """The base module's output, what it should be with LoRA, and what it is."""
        num_rows = sum(len(sequence.token_ids) for sequence in sequences)
        x = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(7))
        x = x.to(self.module.weight.dtype)
        base = nn.functional.linear(x, self.module.weight, self.module.bias).detach()
        slots = [s.slot for s in sequences for _ in s.token_ids]
        depths = [s.depth for s in sequences for _ in s.token_ids]
        bias = self.module.bias.detach()
        expected = apply_per_row(base, x, slots, depths, 1, self.weights, bias)
        step = context.StepContext(AttentionProbe(), LoraStep.build(sequences, 4))
        with context.step(step), torch.inference_mode(), self.counted:
            return base, expected, self.module(x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["plain", "ranks", "bias", "dora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_as_if_it_were_alone(layout: str, kind: str, dtype: torch.dtype) -> None:
    bench = Bench(kind, dtype)
    sequences = LAYOUTS[layout]
    base, expected, output = bench.run(sequences)
    error = (output - expected).float().norm()
    assert error <= TOLERANCE[dtype] * expected.float().norm()
    assert error < 0.1 * (expected - base).float().norm()  # an adapter that was left out would show
    is_reached = torch.tensor([s.depth > 1 for s in sequences for _ in s.token_ids])
    assert torch.equal(output[~is_reached], base[~is_reached])


def test_all_plain_adapters_share_two_products() -> None:
    bench = Bench("plain", torch.float32)
    bench.run(LAYOUTS["decodes, then prompts"])
    assert (bench.counted.num_grouped, bench.counted.num_single) == (2, 0)
    special = Bench("dora", torch.float32)
    special.run(LAYOUTS["decodes, then prompts"])  # one segment is DoRA's
    assert (special.counted.num_grouped, special.counted.num_single) == (2, 2)


def test_rows_that_the_kernel_does_not_take_are_left() -> None:
    bench = Bench("plain", torch.float32, out_features=42)
    _, expected, output = bench.run(LAYOUTS["prompts"])
    assert torch.allclose(output, expected, atol=1e-4)
    assert bench.counted.num_grouped == 0


def test_a_grouping_names_each_row_by_slot() -> None:
    segments = [Segment(0, 1, 3), Segment(3, 3, 4), Segment(0, 7, 8)]
    grouping = Grouping.build(segments, NUM_SLOTS, CPU)
    assert grouping.rows.tolist() == [1, 2, 7, 3]
    assert grouping.slots.tolist() == [0, 0, 0, 3]
    assert grouping.ends.tolist() == [3, 3, 3, 4]
    assert grouping.ends.dtype == torch.int32


def test_it_is_for_devices_that_need_not_wait() -> None:
    assert not grouped_mm.is_available(CPU, torch.bfloat16)


@pytest.fixture
def runners(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """One that multiplies groups, one that does not."""
    made = []
    for is_available in (True, False):
        monkeypatch.setattr(grouped_mm, "is_available", lambda *_, is_it=is_available: is_it)
        model = tiny.base.model
        cache = KVCache(tiny.base.kv_specs, 32, 4, model.dtype, model.device)
        slots = GatheredSlots(tiny.targets, 3, model.dtype, model.device)
        made.append(ModelRunner(model, cache, tiny.targets, 3, gathered=slots))
    yield made[0], made[1]
    for runner in made:
        runner.close()


def test_a_models_prompts_are_the_same(
    tiny: Tiny, runners: tuple[ModelRunner, ModelRunner]
) -> None:
    logits = []
    counts = []
    for runner in runners:
        slots = [
            runner.slots.acquire(uid, read_checkpoint(tiny.adapter(name), tiny.targets))
            for uid, name in enumerate(("a", "b", "c"))
        ]
        assert slots == [0, 1, 2]
        batch = [
            BatchedSequence(
                list(random_prompt(9 + index, seed=index)), 0, list(range(5 * index, 5 * index + 5)),
                slot, depth, 2,
            )
            for index, (slot, depth) in enumerate([(0, NUM_LAYERS), (1, 2), (2, 3), (0, 1), (-1, 0)])
        ]  # fmt: skip
        with Products() as counted:
            logits.append(runner.run(batch)[0])
        counts.append(counted.num_grouped)
        runner.close()
    assert torch.allclose(*logits, atol=1e-4)
    assert counts[0] > 0
    assert counts[1] == 0
