"""Fused norms: the model says what it said, in fewer operators, and odd norms are left as they are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import norms
from server.model.norms import FusedRMSNorm
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, random_prompt

PROMPT = torch.tensor([random_prompt(12, seed=1)])
LEFT = {"gemma": "1 + weight", "gemma2": "1 + weight", "gemma3": "1 + weight"}
NUM_NORMS = {"llama": 2 * NUM_LAYERS + 1, "qwen3": 4 * NUM_LAYERS + 1, "olmo2": 4 * NUM_LAYERS + 1}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*NUM_NORMS, "phi3", "mixtral", "granite", "gpt_neox", *LEFT])
def test_a_model_says_what_it_said(name: str, dtype: torch.dtype) -> None:
    model = build_model(BY_NAME[name]).to(dtype)
    fused = copy.deepcopy(model)
    num_fused = norms.fuse(fused)
    assert num_fused == sum(isinstance(module, FusedRMSNorm) for module in fused.modules())
    assert num_fused == NUM_NORMS.get(name, num_fused)
    if name in LEFT or name == "gpt_neox":  # which has layer norms
        assert num_fused == 0
    with torch.inference_mode():
        expected, actual = (each(PROMPT).logits.float() for each in (model, fused))
    assert (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    for (key, kept), (other, tensor) in zip(
        model.state_dict().items(), fused.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(kept, tensor)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += 1
        return func(*args, **(kwargs or {}))


def test_a_norm_is_one_operator() -> None:
    model = build_model(BY_NAME["llama"]).to(torch.bfloat16)
    norm = model.get_decoder().norm
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    counts = []
    for _ in range(2):
        with torch.inference_mode(), Calls() as calls:
            norm(x)
        counts.append(calls.num)
        norms.fuse(norm)
    assert counts[0] == 8
    assert counts[1] == 1


class OddRMSNorm(nn.Module):
    """A norm with something of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.eps = 1e-5
        self._kind = kind
        if kind == "bias":
            self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor | tuple[Tensor]:
        eps = 1e-3 if self._kind == "eps" else self.eps
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        if self._kind == "mean":
            normed = normed - x.mean(-1, keepdim=True)
        if self._kind == "gate":
            assert gate is None, "unused"
            raise TypeError("it needs a gate")
        if self._kind == "offset":
            return normed * (1 + self.weight)
        return (normed * self.weight,) if self._kind == "tuple" else normed * self.weight


@pytest.mark.parametrize("kind", ["eps", "mean", "gate", "offset", "tuple", "bias"])
def test_a_norm_that_computes_something_else_stays(kind: str) -> None:
    module = OddRMSNorm(kind)
    assert norms.fuse(module) == 0
    assert type(module) is OddRMSNorm
    assert norms.fuse(OddRMSNorm("plain")) == 1
