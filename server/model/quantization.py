"""The base model's decoder Linears in int8, by torchao: weight-only, symmetric, a scale an output channel.

    W [out_features, in_features]  ->  Q int8, scales float32 [out_features],  W ~ scales * Q

Embeddings, `lm_head` and routed experts stay as they are, and so does all arithmetic: activations are not
quantized, and LoRA is added to the outputs in the model's dtype. Called by `loader` once the weights are on
their device; `int8_product` multiplies what was made here. torchao is an extra, imported only where it is
asked for.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from server.errors import ModelError
from server.model.packed_memory import page_out, trim
from server.model.targets import Targets

Quantization = Literal["none", "int8"]

REVISION_ENDING = {"none": "", "int8": "-int8"}
"""Of the base model's name, which says what its weights are: a record or a cached block of the one is none of
the other's."""

_OLDEST = Version("0.18")
"""The first torchao whose one int8 tensor is this."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """What became of one weight."""

    values: Tensor
    """int8 `[out_features, in_features]`"""
    scales: Tensor
    """float32 `[out_features]`"""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """`[out_features, in_features]`, rounded once."""
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)


def why_not() -> str | None:
    """The reason this installation cannot quantize, None when it can."""
    try:
        found = version("torchao")
    except PackageNotFoundError:
        return "needs torchao: pip install 'fathom-lora[int8]'"
    if Version(found) < _OLDEST:
        return (
            f"needs torchao {_OLDEST} or later, found {found}: pip install -U 'fathom-lora[int8]'"
        )
    return None


@torch.no_grad()
def quantize(model: nn.Module, targets: Targets) -> int:
    """Quantize every Linear of the decoder layers in place; returns how many bytes that saves.

    Raises ModelError where torchao is missing, or where the layers have other kinds of weights.
    """
    if (reason := why_not()) is not None:
        raise ModelError(f"quantization int8 {reason}", param="quantization")
    linears = _linears(model, targets)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Else it sets how all of torch multiplies float32, and inductor's flags.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    num_saved = 0
    for module in linears:
        plain = module.weight.detach()
        quantize_(module, config)
        num_saved += saved_bytes(module, plain.dtype)
        page_out(plain)
        trim()
    return num_saved


def linears_of(targets: Targets) -> list[nn.Linear]:
    """The modules that `quantize` is for."""
    return [
        target.module
        for target in targets.values()
        if target.kind == "linear" and isinstance(target.module, nn.Linear)
    ]


def saved_bytes(module: nn.Linear, dtype: torch.dtype) -> int:
    """What int8 saves of a Linear's weight in this dtype."""
    num_weights = module.in_features * module.out_features
    return num_weights * (dtype.itemsize - 1) - 4 * module.out_features


def is_int8(module: nn.Module) -> bool:
    """Whether a Linear's weight is torchao's; asked before it is packed."""
    weight = module._parameters.get("weight")
    return weight is not None and type(weight).__module__.startswith("torchao.")


def read(module: nn.Linear) -> Int8Weight:
    """The numbers of a Linear that `quantize` made. Raises ModelError for another kind of quantization."""
    weight = module.weight
    values, scales = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    zero_point = getattr(weight, "zero_point", None)
    if (
        not isinstance(values, Tensor)
        or not isinstance(scales, Tensor)
        or values.dtype is not torch.int8
        or scales.numel() != module.out_features
        or getattr(weight, "act_quant_kwargs", None) is not None
        or getattr(weight, "act_pre_scale", None) is not None
        or (zero_point is not None and bool(zero_point.any()))
    ):
        raise ModelError(f"a weight is a {type(weight).__name__} of a kind that is not served")
    return Int8Weight(values.contiguous(), scales.flatten().float())


def _linears(model: nn.Module, targets: Targets) -> list[nn.Linear]:
    name = type(model).__name__
    if any(target.kind == "conv1d" for target in targets.values()):
        raise ModelError(
            f"quantization int8 is for Linear layers, and {name} projects by Conv1D",
            param="quantization",
        )
    linears = linears_of(targets)
    if not linears:
        raise ModelError(
            f"quantization int8: {name} has no Linear in its decoder layers", param="quantization"
        )
    for module in linears:
        if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            raise ModelError(
                f"quantization int8: the weights of {name} are quantized already",
                param="quantization",
            )
    return linears
