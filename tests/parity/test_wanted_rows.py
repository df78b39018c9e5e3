"""A prompt's last layer is computed for the rows that are read, and nothing shows of it in the result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.core import EngineCore
from server.engine.request import Request
from server.model import packed
from server.model.foreign_hooks import ForeignHooks
from server.model.replay.tape import noting
from server.model.wanted_rows import WantedRows
from tests.device import DEVICE
from tests.parity.conftest import AdapterPath, ModelPath
from tests.parity.generation import generate, greedy, open_core
from tests.parity.zoo import NUM_LAYERS, random_prompt

pytestmark = pytest.mark.skipif(
    not packed.is_available(torch.device(DEVICE), torch.float32),
    reason="weights are not packed here",
)


class PackedRows:
    """How many rows each packed product had; a `tape.CallNoter`."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def call(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            self.seen.append(args[0].shape[:-1].numel())
        return function(*args)


@pytest.fixture
def core(model_path: ModelPath, adapter_path: AdapterPath) -> Iterator[EngineCore]:
    with open_core(model_path("llama"), max_num_batched_tokens=128, prefix_caching=False) as core:
        core.registry.load("plain", adapter_path("llama", "plain"))
        yield core


def first_step(core: EngineCore, *requests: Request) -> list[int]:
    rows = PackedRows()
    for request in requests:
        core.add(request)
    with noting(rows):
        core.step()
    for request in requests:
        core.abort(request.id)
    return rows.seen


def test_its_last_layer_is_computed_for_its_last_token(core: EngineCore) -> None:
    select = core.registry.select
    requests = [
        greedy("a", random_prompt(20, seed=1), select(core.info.name, None), 4),
        greedy("b", random_prompt(11, seed=2), select("plain", NUM_LAYERS), 4),
    ]
    seen = first_step(core, *requests)
    # Four products a layer (q, k and v are one, gate and up too), of the last layer three after
    # attention; lm_head is tied or packed.
    assert seen[: 4 * NUM_LAYERS - 3] == [31] * (4 * NUM_LAYERS - 3)
    assert set(seen[4 * NUM_LAYERS - 3 :]) == {2}


def test_a_hook_of_somebody_else_sees_all_of_it(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = core.registry.select("plain", NUM_LAYERS)
    layer = core.runner.model.model.layers[NUM_LAYERS - 1]

    def seen() -> tuple[list[int], Tensor]:
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda *hooked: outputs.append(hooked[-1].clone()))
        try:
            rows = first_step(core, greedy("a", random_prompt(20, seed=7), adapted, 4))
        finally:
            handle.remove()
        return rows, outputs[0][0]

    rows, output = seen()
    assert rows[: 4 * NUM_LAYERS] == [20] * 4 * NUM_LAYERS
    assert output.norm(dim=-1).min() > 0
    assert 20 not in first_step(core, greedy("b", random_prompt(20, seed=7), adapted, 4))[-4:]
    # The control: a runner that does not ask shows the hook what nobody computed.
    monkeypatch.setattr(ForeignHooks, "exist", lambda self: False)
    rows, pruned = seen()
    assert rows[4 * NUM_LAYERS - 1] == 1
    torch.testing.assert_close(pruned[-1], output[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruned[:-1], output[:-1], atol=1e-3)


def test_the_result_is_that_of_computing_all_of_it(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = core.registry.select

    def run() -> dict[str, Tensor]:
        requests = [
            greedy("a", random_prompt(40, seed=3), select(core.info.name, None), 3),
            greedy("b", random_prompt(33, seed=4), select("plain", NUM_LAYERS), 3),
            greedy("c", random_prompt(37, seed=5), select("plain", 1), 3),
        ]
        return {name: one.logits for name, one in generate(core, requests).items()}

    pruned = run()
    monkeypatch.setattr(WantedRows, "multiply", lambda self, product, input: product(input))
    whole = run()
    for name, logits in whole.items():
        torch.testing.assert_close(pruned[name], logits, rtol=1e-5, atol=1e-5)


def test_the_control_another_row_would_show(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = greedy("a", random_prompt(40, seed=6), core.registry.select("plain", NUM_LAYERS), 1)
    right = generate(core, [request])["a"].logits
    init = WantedRows.__init__

    def wrong(self: WantedRows, rows: Tensor, num_rows: int, num_layers: int) -> None:
        init(self, rows - 1, num_rows, num_layers)

    monkeypatch.setattr(WantedRows, "__init__", wrong)
    other = generate(core, [request])["a"].logits
    assert not torch.allclose(right, other, atol=1e-3)
