"""Which layers of an adapter apply their LoRA, one by one: a depth is the mask that begins with ones.

Masks other than depths are controls: k layers chosen by another rule, or at random. LoRA of the
embedding goes with the first layer and LoRA of the output head with the last one, which for a depth
is what `boundary.depth` says. `lora_mask` switches PEFT's modules for the whole model, the slow and
plain way that faster ways are compared with.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from boundary.depth import decoder_layers, lora_depth, lora_off, num_decoder_layers

Mask = tuple[bool, ...]
"""One truth value a decoder layer: does it apply its LoRA?"""


def depth_masks(num_layers: int) -> list[Mask]:
    """The masks of all depths, `0..num_layers`, in this order."""
    return [
        tuple(layer_idx < depth for layer_idx in range(num_layers))
        for depth in range(num_layers + 1)
    ]


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


@contextmanager
def lora_mask(model: PeftModel, mask: Mask) -> Iterator[None]:
    """Inside the block, layer `layer_idx` applies its LoRA only if `mask[layer_idx]`.

    Layers are only ever switched off, and on leaving every switch is as it was. Raises ValueError,
    before anything is switched, if the mask has another length than the model or if the model has
    parts that no mask can switch.
    """
    check_masks([mask], num_decoder_layers(model))
    with lora_off(module for _, module, layer_idx in lora_modules(model) if not mask[layer_idx]):
        yield


def check_masks(masks: list[Mask], num_layers: int) -> None:
    """Raise ValueError unless there are masks and each has one value a layer."""
    if not masks:
        raise ValueError("no masks: there is nothing to score")
    for mask in masks:
        if len(mask) != num_layers:
            raise ValueError(f"a mask must have {num_layers} values, one a layer, got {len(mask)}")
