"""RMS norms in one kernel each, on a CUDA device.

transformers writes an RMS norm as eight operators, which is what a decode step of a small batch then
mostly launches: 16 of about 41 kernels a Llama layer in bfloat16, for two norms. torch has one that
does it all. Where a norm of the model, tried on random numbers, gives what torch's gives, its class is
exchanged; it keeps its weight, its name and its hooks. One that computes something else (Gemma
multiplies by `1 + weight`) stays. Called by `prepare`, before the self-test.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest ||torch's - the model's|| / ||the model's||: the model's rounds once more."""
_NUM_ROWS = 4


class FusedRMSNorm(nn.Module):
    """What a norm became; made only by `fuse`."""

    weight: Tensor
    _eps: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) * weight. hidden_states `[..., hidden_size]`; returns the same."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self._eps)


@torch.inference_mode()
def fuse(model: nn.Module) -> int:
    """Exchange every norm that torch's reproduces; returns how many."""
    num_fused = 0
    for module in model.modules():
        eps = _eps_of(module)
        if eps is not None and _is_same(module, eps):
            module.__class__ = FusedRMSNorm
            assert isinstance(module, FusedRMSNorm)
            module._eps = eps
            num_fused += 1
    return num_fused


def _eps_of(module: nn.Module) -> float | None:
    """What is added to the mean square, None for a module that is no norm with one weight."""
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"]:
        return None
    for name in ("variance_epsilon", "eps"):
        eps = getattr(module, name, None)
        if isinstance(eps, float):
            return eps
    return None


def _is_same(module: nn.Module, eps: float) -> bool:
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype not in _TOLERANCE:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (1, _NUM_ROWS, len(weight))
    drawn = torch.randn(shape, generator=generator, device=weight.device)
    # Rows of very different sizes, so that another `eps` shows.
    sizes = torch.logspace(-3, 1, _NUM_ROWS, device=weight.device).unsqueeze(1)
    rows = (drawn * sizes).to(weight.dtype)
    try:
        expected = module(rows)
    except (TypeError, RuntimeError):
        return False  # it wants something beside its input
    if not isinstance(expected, Tensor) or expected.dtype != rows.dtype:
        return False
    fused = functional.rms_norm(rows, weight.shape, weight, eps)
    error = (fused.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return bool((error <= _TOLERANCE[weight.dtype]).all())
