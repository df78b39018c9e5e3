"""A plain PEFT model at a depth, LoRA in the decoder layers below it and none above, or at a mask.

The plain way, with PEFT's own switches and one depth or mask for the whole batch: for notebooks, and
what faster ways are compared with. Knows no tokenizer, no data and no server.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from boundary.limits import held_back
from boundary.mask import Mask, check_masks

Depth = int | Literal["full"] | None
"""How many layers; "full" and None are all of them."""


@contextmanager
def lora_depth(model: PeftModel, depth: Depth | Mapping[str, Depth]) -> Iterator[None]:
    """Inside the block, layer `layer_idx` applies its LoRA only if `layer_idx < depth`.

    Depth 0 is the base model and `num_decoder_layers(model)`, "full" or None the whole adapter. LoRA
    of the embedding belongs to depth >= 1, LoRA of the output head to full depth only. A module above
    the depth runs the layer that it wraps and launches nothing more, also in `model.generate`.

    depth: of all adapters, or of each by its name, where those that are not named stay whole. It
        holds for active adapters and for those that rows ask for by `adapter_names`.

    Layers are only ever held back, so a nested block narrows the outer one. On leaving, also by an
    exception, the model is as it was. The model is one: what other threads run on it meanwhile has
    the depth too.

    In training, layers above the depth get no gradient. With gradient checkpointing a backward pass
    runs the layers again, perhaps after the block and then whole: that is refused.

    Raises ValueError, before anything is held back, if a depth is out of range or of an adapter that
    the model does not have, or if the model has parts that a depth cannot switch: merged LoRA,
    trained biases, `modules_to_save`, trainable tokens, LoRA outside the decoder.
    """
    max_depth = num_decoder_layers(model)
    by_adapter = depth if isinstance(depth, Mapping) else {}
    for adapter in by_adapter:
        if adapter not in model.peft_config:
            known = ", ".join(map(repr, model.peft_config))
            raise ValueError(f"the model has no adapter {adapter!r}; it has {known}")
    depths = {adapter: _number(value, max_depth) for adapter, value in by_adapter.items()}
    common = max_depth if isinstance(depth, Mapping) else _number(depth, max_depth)
    _refuse_unswitchable(model)
    if common < max_depth or any(value < max_depth for value in depths.values()):
        _refuse_recomputation(model)
    held: list[tuple[LoraLayer, Collection[str] | None]] = []
    for module, needed in _needed_depths(model):
        too_deep = {adapter for adapter, value in depths.items() if value < needed}
        if common < needed:
            held.append((module, None))
        elif too_deep:
            held.append((module, too_deep))
    with held_back(held):
        yield


@contextmanager
def lora_mask(model: PeftModel, mask: Mask) -> Iterator[None]:
    """Inside the block, layer `layer_idx` applies its LoRA only if `mask[layer_idx]`.

    Layers are only ever held back, and on leaving the model is as it was. Raises ValueError, before
    anything is held back, if the mask has another length than the model or if the model has parts
    that no mask can switch.
    """
    check_masks([mask], num_decoder_layers(model))
    modules = lora_modules(model)
    with held_back((module, None) for _, module, layer_idx in modules if not mask[layer_idx]):
        yield


def lora_modules(model: PeftModel) -> list[tuple[str, LoraLayer, int]]:
    """Every LoRA module with its name in `model` and the layer that it goes with.

    Raises ValueError for what no depth can switch, as `lora_depth` does.
    """
    with lora_depth(model, num_decoder_layers(model)):
        pass  # full depth switches nothing, and has looked at every module
    prefix, layers = decoder_layers(model)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)  # decoder_layers takes no other
    embedding: object = base.get_input_embeddings()
    found: list[tuple[str, LoraLayer, int]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name.startswith(f"{prefix}."):
            layer_idx = int(name.removeprefix(f"{prefix}.").split(".")[0])
        else:
            layer_idx = 0 if module is embedding else len(layers) - 1
        found.append((name, module, layer_idx))
    return found


def num_decoder_layers(model: nn.Module) -> int:
    """How many decoder layers the model has, which is its greatest depth."""
    return len(decoder_layers(model)[1])


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in `model`, which may be wrapped by PEFT.

    Recognised by its length, which the config states: no list of module names has to be kept. Of
    nested lists (the experts of a layer may be as many) the outermost counts. Raises ValueError
    unless there is exactly one.
    """
    num_layers = _base_model(model).config.get_text_config(decoder=True).num_hidden_layers
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inside:
            found.append((name, module))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"expected one list of {num_layers} decoder layers, found: {names}")
    return found[0]


def _needed_depths(model: PeftModel) -> list[tuple[LoraLayer, int]]:
    """Every LoRA module with the smallest depth at which it is on."""
    prefix, layers = decoder_layers(model)
    base = _base_model(model)
    # Typed as any module: PEFT's wrapper stands in the place of the one it wraps.
    head: object = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: object = base.get_input_embeddings()
    needed: list[tuple[LoraLayer, int]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name.startswith(f"{prefix}."):
            layer_idx = int(name.removeprefix(f"{prefix}.").split(".")[0])
            needed.append((module, layer_idx + 1))
        elif module is head:
            needed.append((module, len(layers)))
        elif module is embedding:
            needed.append((module, 1))
        else:
            raise ValueError(f"LoRA on {name} belongs to no depth: it is outside the decoder")
    if not needed:
        raise ValueError("the model has no LoRA module")
    return needed


def _refuse_unswitchable(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(f"LoRA is merged into {name}: unmerge it to choose a depth")
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{name} is a trained copy of a base module, which no depth can switch off"
            )
    for adapter, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ValueError(
                f"adapter {adapter!r} has bias={bias!r}, which no depth can switch off"
            )


def _refuse_recomputation(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                f"gradient checkpointing is on in {name or 'the model'}: the backward pass would run"
                " its layers again, and whole once the block is left; switch it off"
                " (model.gradient_checkpointing_disable()) or call model.eval()"
            )


def _number(depth: Depth, max_depth: int) -> int:
    """The depth as a number. Raises ValueError if it is out of range, TypeError if it is none."""
    if depth is None or depth == "full":
        return max_depth
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f'depth must be a number, "full" or None, got {depth!r}')
    if not 0 <= depth <= max_depth:
        raise ValueError(f"depth must be between 0 and {max_depth}, got {depth}")
    return depth


def _base_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(base).__name__}")
    return base
