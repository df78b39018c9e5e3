"""Is what is about to be timed also right, piece by piece? On the device it will be timed on.

The gathered kernel beside the plain formula in float64, and recorded steps beside the same steps run
by Python. `server.bench.check` then compares the whole engine with PEFT.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from server.model import products
from server.model.batch import BatchedSequence
from server.model.gathered import pick_kernel
from server.model.gathered_kernel import Rows
from server.model.lora import LoraWeights, apply_per_row
from server.model.runner import ModelRunner
from server.model.stacks import SharedInput
from server.model.targets import Target
from server.model.tolerance import LOGITS_TOLERANCE

KERNEL_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ||kernel - float64|| / ||float64||."""
RANKS = (8, 16, 64, 256)
_NUM_SLOTS = 4
_WIDTHS = [136, 40, 64]
_NUM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Agreement:
    """One comparison: the largest error found, and the largest that passes."""

    what: str
    error: float
    tolerance: float
    num_compared: int

    @property
    def is_passed(self) -> bool:
        """False for NaN, too, and where nothing was compared."""
        return self.num_compared > 0 and self.error <= self.tolerance


def kernel_agreements(device: torch.device, widths: Iterable[int]) -> Iterator[Agreement]:
    """The device's gathered kernel, one dtype after the other. widths: input features to try."""
    kernel = pick_kernel(device)
    widths = tuple(widths)
    for dtype, tolerance in KERNEL_TOLERANCE.items():
        errors = [
            _kernel_error(device, dtype, rank, in_features, num_rows)
            for rank, in_features, num_rows in product(RANKS, widths, (1, 5, 40))
        ]
        what = f"{kernel.name} kernel, {str(dtype).removeprefix('torch.')}"
        yield Agreement(what, _largest(errors), tolerance, len(errors))


def _kernel_error(
    device: torch.device, dtype: torch.dtype, rank: int, in_features: int, num_rows: int
) -> float:
    generator = torch.Generator(device).manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    # Three that read one tensor as columns of one product; no width is a multiple of every tile.
    linears = nn.ModuleList(
        nn.Linear(in_features, width, device=device, dtype=dtype) for width in _WIDTHS
    )
    members = [module for module in linears if isinstance(module, nn.Linear)]
    products.share(linears, [members])
    targets = [Target(m, 0, "linear", in_features, m.out_features) for m in members]
    group = SharedInput(targets, _NUM_SLOTS, torch.empty(0, dtype=dtype, device=device))
    assert group.product is not None
    held: list[dict[int, LoraWeights]] = [{} for _ in targets]
    for index, out_features in enumerate(_WIDTHS):
        for slot in range(_NUM_SLOTS - 1):  # the last stays empty
            if (index, slot) == (1, 0):
                continue  # so does a module of the first
            lora = LoraWeights(
                draw(rank, in_features) * in_features**-0.5,
                draw(out_features, rank) * rank**-0.5,
                scaling=1.0 + slot,
                bias=draw(out_features) if slot == 1 else None,
                gain=1 + 0.1 * draw(out_features) if slot == 2 else None,
            )
            held[index][slot] = _double(lora)
            group.put(index, slot, lora)
    slots = [row * (_NUM_SLOTS + 1) // num_rows - 1 for row in range(num_rows)]
    depths = [row % 3 for row in range(num_rows)]
    x, output, bias = draw(num_rows, in_features), draw(num_rows, sum(_WIDTHS)), draw(sum(_WIDTHS))
    rows = Rows(
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(depths, dtype=torch.int32, device=device),
    )
    kernel = pick_kernel(device)
    expected = [
        apply_per_row(own, x.double(), slots, depths, 0, weights, own_bias)
        for own, weights, own_bias in zip(
            torch.split(output.double(), _WIDTHS, 1),
            held,
            torch.split(bias.double(), _WIDTHS),
            strict=True,
        )
    ]
    together = output.clone()
    low_rank = kernel.shrink(x, group.down, rows, 0)
    kernel.expand(together, low_rank, group.up, rows, 0, bias)
    actual = list(torch.split(together, _WIDTHS, 1))
    # And each into an output of its own.
    for index, (own, own_bias) in enumerate(
        zip(torch.split(output, _WIDTHS, 1), torch.split(bias, _WIDTHS), strict=True)
    ):
        up = group.modules[index].up
        assert up is not None
        alone = own.contiguous()
        kernel.expand(alone, low_rank[index : index + 1], up, rows, 0, own_bias)
        actual.append(alone)
    exact = torch.cat([*expected, *expected], 1)
    return float((torch.cat(actual, 1).double() - exact).norm() / exact.norm())


def _double(lora: LoraWeights) -> LoraWeights:
    return replace(
        lora,
        lora_A=lora.lora_A.double(),
        lora_B=lora.lora_B.double(),
        bias=None if lora.bias is None else lora.bias.double(),
        gain=None if lora.gain is None else lora.gain.double(),
    )


def graph_agreement(runner: ModelRunner, adapters: Sequence[tuple[int, int]]) -> Agreement:
    """Recorded decode steps beside the same steps run by Python.

    adapters: slot and depth of one sequence each, the base's -1 and 0. They decode together, each from
    a prompt of its own, and trade adapters between the steps, so that every recording is used with
    others than it was made with.
    """
    graphs = runner.graphs
    assert graphs is not None
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(runner.model.config.get_text_config().vocab_size)
    longest = 3 + 5 * len(adapters) + _NUM_STEPS
    num_blocks = runner.cache.num_blocks_for(longest)
    errors: list[float] = []
    for turn in range(len(adapters)):
        batch = []
        for index in range(len(adapters)):
            slot, depth = adapters[(index + turn) % len(adapters)]
            prompt_len = 3 + 5 * index
            tokens = torch.randint(vocab_size, (prompt_len,), generator=generator).tolist()
            blocks = list(range(index * num_blocks, (index + 1) * num_blocks))
            batch.append(BatchedSequence(tokens, 0, blocks, slot, depth, 1))
        logits, order = runner.run(batch)
        for _ in range(_NUM_STEPS):
            following = logits.argmax(dim=1).tolist()
            batch = [
                replace(batch[index], token_ids=[token], start=batch[index].num_kv_tokens)
                for index, token in zip(order, following, strict=True)
            ]
            num_replays = graphs.num_replays
            recorded = runner.run(batch)[0].clone()
            if graphs.num_replays > num_replays:
                runner.graphs = None
                logits, order = runner.run(batch)
                runner.graphs = graphs
                difference = (recorded.float() - logits.float()).norm(dim=1)
                errors.extend((difference / logits.float().norm(dim=1)).tolist())
            else:
                logits, order = recorded, list(range(len(batch)))
    tolerance = LOGITS_TOLERANCE[runner.model.dtype]
    return Agreement("recorded steps", _largest(errors), tolerance, len(errors))


def _largest(errors: Sequence[float]) -> float:
    """NaN if any is: `max` would lose it."""
    return float(torch.tensor(errors).max()) if errors else 0.0
