"""What a PEFT model in memory is called: its base and its adapter as their files will be known.

A server knows both by their files (`fingerprint`). In memory the base is wrapped by PEFT and its
config written to by training, and an adapter may have been cast since it was read. So the base's
config is read again from where it came from, and the adapter's tensors are remembered one by one,
to be found again in the files beside which a record is put.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from boundary.checkpoint_files import PREFIX, WEIGHTS_NAME
from boundary.fingerprint import (
    EMBEDDING_PARTS,
    LINEAR_PARTS,
    AdapterFingerprint,
    base_fingerprint,
)

Modules = Mapping[str, Mapping[str, Tensor]]
"""Module -> part -> tensor, as in a checkpoint."""


class Unknowable(ValueError):
    """Why a model in memory, or what lies beside it, cannot be called by a fingerprint."""


def base_of(model: PeftModel, path: str | os.PathLike[str] | None = None) -> str:
    """The base model's fingerprint, as a server has it that loads the same files.

    path: of its files, or its hub id; by default where it says that it was loaded from.

    A base from the hub is called by its commit, whatever became of its weights since.

    Raises Unknowable if that is nowhere, or if the weights in memory are not those of the files:
    quantized, offloaded, or in a dtype that lost digits.
    """
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    place = str(path or base.config._name_or_path or "")
    commit = getattr(base.config, "_commit_hash", None)
    if path is None and commit and not Path(place).is_dir():
        return str(commit)
    if not place:
        raise Unknowable(
            "the base model was made in memory: save it, and name its directory with base="
        )
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise Unknowable(f"no config of the base model could be read at {place!r}") from error
    if getattr(base, "is_quantized", False):
        raise Unknowable("the base model is quantized in memory, and its files may not be")
    if base.dtype == torch.float16 != config.dtype:
        raise Unknowable("the base model was cast to float16, which its files are not")
    tensors = _unwrapped(base)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise Unknowable("some of the base model's weights are not in memory (offloaded)")
    return base_fingerprint(place, config, sorted(tensors.items()))


@dataclass(frozen=True, slots=True)
class _Kept:
    """One tensor as it was: enough to know it again in another dtype."""

    dtype: torch.dtype
    digest: bytes

    def is_in(self, tensor: Tensor) -> bool:
        return _digest(tensor.to(self.dtype)) == self.digest


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """One adapter as it was in memory.

    fingerprint: of the checkpoint that PEFT would write of it.
    """

    fingerprint: str
    scalings: Mapping[str, float]
    tensors: Mapping[tuple[str, str], _Kept]

    def beside(self, directory: Path) -> str:
        """The fingerprint of the checkpoint in `directory`, which holds this adapter.

        Where there is none yet, that of the one to come. Raises Unknowable if it is another's.
        """
        if not (directory / WEIGHTS_NAME).exists():
            return self.fingerprint
        try:
            config = PeftConfig.from_pretrained(str(directory))
            with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
                modules = _by_module((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise Unknowable(
                f"the adapter in {str(directory)!r} cannot be read: {error}"
            ) from error
        if not isinstance(config, LoraConfig):
            raise Unknowable(f"the adapter in {str(directory)!r} is no LoRA")
        places = {(name, part) for name, parts in modules.items() for part in parts}
        if places != self.tensors.keys():
            raise _another(directory, "it has other tensors")
        for (name, part), kept in self.tensors.items():
            if not kept.is_in(modules[name][part]):
                raise _another(directory, f"{part} of {name} differs")
        scalings = {name: _scaling(config, name, parts) for name, parts in modules.items()}
        for name, scaling in scalings.items():
            if scaling != self.scalings[name]:
                raise _another(directory, f"its scaling of {name} is {scaling}")
        return _fingerprint(config, scalings, modules)


def adapter_of(model: PeftModel, adapter: str) -> AdapterContent:
    """What one adapter of the model is."""
    config = model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    modules = _by_module((name, tensor.detach().cpu()) for name, tensor in state.items())
    layers = dict(model.get_base_model().named_modules())
    scalings = {}
    for name in modules:
        layer = layers[name]
        assert isinstance(layer, LoraLayer)
        scalings[name] = float(layer.scaling[adapter])
    return AdapterContent(
        fingerprint=_fingerprint(config, scalings, modules),
        scalings=scalings,
        tensors={
            (name, part): _Kept(tensor.dtype, _digest(tensor))
            for name, parts in modules.items()
            for part, tensor in parts.items()
        },
    )


def _unwrapped(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base model's own `state_dict()`, as it was before PEFT put its modules in."""
    wrapped = [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    inside = {f"{name}." for name in wrapped}
    found: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        prefix = next((prefix for prefix in inside if name.startswith(prefix)), None)
        if prefix is None:
            found[name] = tensor
        elif name.startswith(f"{prefix}base_layer."):
            found[prefix + name.removeprefix(f"{prefix}base_layer.")] = tensor
    return found


def _by_module(named: Iterable[tuple[str, Tensor]]) -> Modules:
    """Tensors of a checkpoint in their places; copies of the base's own weights are passed over."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in named:
        path = name.removeprefix(PREFIX)
        for ending, part in (LINEAR_PARTS | EMBEDDING_PARTS).items():
            if path.endswith(ending):
                modules[path.removesuffix(ending)][part] = tensor
    return modules


def _scaling(config: LoraConfig, name: str, parts: Mapping[str, Tensor]) -> float:
    """What PEFT makes of the config for this module."""
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    rank = parts["lora_A"].shape[0]
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _fingerprint(config: LoraConfig, scalings: Mapping[str, float], modules: Modules) -> str:
    fingerprint = AdapterFingerprint(
        use_rslora=config.use_rslora, use_dora=config.use_dora, lora_bias=config.lora_bias
    )
    for name, parts in sorted(modules.items()):
        whole = {part: tensor.contiguous() for part, tensor in parts.items()}
        fingerprint.add(name, scalings[name], whole)
    return fingerprint.text()


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).digest()


def _another(directory: Path, why: str) -> Unknowable:
    return Unknowable(
        f"the adapter in {str(directory)!r} is not the one that was calibrated: {why}; save the"
        " model there first (model.save_pretrained)"
    )
