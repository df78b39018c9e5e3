"""Invariant 1, Parity: depth `d` is PEFT with the LoRA layers at or above `d` switched off.

One engine an architecture, and in it one batch of every variant at every depth beside the base
model: prompts longer than the sliding window, prefilled in chunks smaller than the prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from server.errors import ModelError
from tests.parity.adapters import EXTRA_VARIANTS, VARIANTS
from tests.parity.conftest import AdapterPath, ModelPath, OracleOf
from tests.parity.generation import Generated, generate, greedy, open_core
from tests.parity.oracle import Answer
from tests.parity.zoo import NUM_LAYERS, ODD, SERVED, SLIDING_WINDOW, random_prompt

MAX_TOKENS = 6
LOGITS_ATOL = 1e-4
"""float32: a packed step sums in another order than a whole recomputation."""
PROMPT_LENS = (3 * SLIDING_WINDOW, 7)
"""The first crosses windows, blocks and chunks; the second fits into one chunk and any window."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One request of the grid. `variant` None is the base model, asked for by its own name."""

    variant: str | None
    depth: int
    prompt_len: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return random_prompt(self.prompt_len, seed=self.prompt_len)


def cells_of(variants: list[str], depths: tuple[int, ...]) -> list[Cell]:
    return [
        Cell(variant, depth, prompt_len)
        for prompt_len in PROMPT_LENS
        for variant, depth in [(None, 0), *((v, d) for v in variants for d in depths)]
    ]


@dataclass(frozen=True, slots=True)
class Grid:
    """What one engine gave for every cell of one architecture."""

    architecture: str
    generated: dict[Cell, Generated]

    def differences(
        self, is_wanted: Callable[[Cell], bool], answer: Callable[[Cell], Answer]
    ) -> list[str]:
        """A line for every wanted cell that differs from its answer."""
        lines = []
        for cell, generated in self.generated.items():
            if not is_wanted(cell):
                continue
            expected = answer(cell)
            error = float((generated.logits - expected.logits).abs().max())
            if generated.token_ids != expected.token_ids or not error <= LOGITS_ATOL:
                lines.append(f"{cell}: {generated.token_ids} != {expected.token_ids}, {error:.1e}")
        return lines


GridOf = Callable[[str, list[str], tuple[int, ...]], Grid]


@pytest.fixture(scope="module")
def grid_of(model_path: ModelPath, adapter_path: AdapterPath) -> GridOf:
    """Generates an architecture's cells at once, and only once."""
    grids: dict[tuple[str, str], Grid] = {}

    def grid(architecture: str, variants: list[str], depths: tuple[int, ...]) -> Grid:
        key = (architecture, " ".join(variants))
        if key not in grids:
            cells = cells_of(variants, depths)
            with open_core(model_path(architecture)) as core:
                for variant in variants:
                    core.registry.load(variant, adapter_path(architecture, variant))
                requests = []
                for cell in cells:
                    name = cell.variant or core.info.name
                    lora = core.registry.select(name, cell.depth)
                    requests.append(greedy(repr(cell), cell.prompt, lora, MAX_TOKENS))
                generated = generate(core, requests)
            grids[key] = Grid(architecture, {cell: generated[repr(cell)] for cell in cells})
        return grids[key]

    return grid


@pytest.mark.parametrize("architecture", [architecture.name for architecture in SERVED])
class TestEveryArchitecture:
    DEPTHS = (0, 1, NUM_LAYERS // 2, NUM_LAYERS)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_every_depth_equals_peft_with_the_layers_above_switched_off(
        self,
        grid_of: GridOf,
        oracle_of: OracleOf,
        architecture: str,
        variant: str,
    ) -> None:
        oracle = oracle_of(architecture, variant)
        lines = grid_of(architecture, list(VARIANTS), self.DEPTHS).differences(
            lambda cell: cell.variant == variant,
            lambda cell: oracle.greedy(cell.prompt, MAX_TOKENS, cell.depth),
        )
        assert not lines, "\n".join(lines)

    def test_the_base_model_and_depth_0_equal_the_model_without_peft(
        self, grid_of: GridOf, oracle_of: OracleOf, architecture: str
    ) -> None:
        oracle = oracle_of(architecture)
        answers = {
            prompt_len: oracle.greedy(Cell(None, 0, prompt_len).prompt, MAX_TOKENS, 0)
            for prompt_len in PROMPT_LENS
        }
        lines = grid_of(architecture, list(VARIANTS), self.DEPTHS).differences(
            lambda cell: cell.depth == 0, lambda cell: answers[cell.prompt_len]
        )
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("variant", EXTRA_VARIANTS)
def test_what_an_adapter_targets_besides_all_layers_equals_peft(
    grid_of: GridOf, oracle_of: OracleOf, variant: str
) -> None:
    oracle = oracle_of("llama", variant)
    depths = tuple(range(NUM_LAYERS + 1))
    lines = grid_of("llama", list(EXTRA_VARIANTS), depths).differences(
        lambda cell: cell.variant == variant,
        lambda cell: oracle.greedy(cell.prompt, MAX_TOKENS, cell.depth),
    )
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("architecture", [architecture.name for architecture in ODD])
def test_an_odd_architecture_is_refused_or_served_right(
    model_path: ModelPath, oracle_of: OracleOf, architecture: str
) -> None:
    prompt = random_prompt(230, seed=1)
    try:
        with open_core(model_path(architecture)) as core:
            base = core.registry.select(core.info.name, None)
            generated = generate(core, [greedy("r", prompt, base, MAX_TOKENS)])["r"]
    except ModelError:
        return
    answer = oracle_of(architecture).greedy(prompt, MAX_TOKENS, 0)
    assert generated.token_ids == answer.token_ids
    assert (generated.logits - answer.logits).abs().max() <= LOGITS_ATOL
