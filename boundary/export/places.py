"""Where each LoRA of a PEFT checkpoint lies, told by the names of its tensors alone.

    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight      layer 3
    base_model.model.model.embed_tokens.lora_embedding_A           before all layers
    base_model.model.lm_head.lora_A.weight                         behind them

The first number in a name is the layer, as it is for PEFT. Without the base model nobody can check
that, so names that could mean something else are refused. Used by `export`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

from boundary import strict_json
from boundary.checkpoint_files import PREFIX
from boundary.record import MAX_LAYERS

EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings"})
"""What transformers calls input embeddings."""
HEADS = frozenset({"lm_head", "embed_out"})
"""What it calls output heads."""

Where = int | Literal["embedding", "head"]
"""A layer by its index, or what comes before or behind all layers."""


def needed_depth(where: Where, num_layers: int) -> int:
    """The smallest depth at which LoRA there is on."""
    if where == "embedding":
        return 1
    return num_layers if where == "head" else where + 1


def lora_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Every LoRA module, by the base model's name for it, with the names of its tensors.

    Copies of the base's own weights are passed over. Raises ValueError for any other tensor.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in names:
        path = name.removeprefix(PREFIX)
        module, _, part = path.rpartition(".lora_")
        if path != name and module and part:
            modules[module].append(name)
        elif path == name or not _is_base_copy(path):
            raise ValueError(
                f"tensor {strict_json.shown(name)} is no part of a LoRA, and belongs to no depth"
            )
    return dict(modules)


def where_of(module: str) -> Where:
    """Where a module lies. Raises ValueError if its name does not tell."""
    parts = module.split(".")
    if "experts" in parts or parts[-1] == "gate":
        raise ValueError(
            f"{strict_json.shown(module)} belongs to routed experts: PEFT may turn it into"
            " target_parameters, which it applies to every layer"
        )
    first = _first_number(parts)
    if first is not None and 0 < first < len(parts) - 1:
        if len(parts[first]) > 4 or int(parts[first]) >= MAX_LAYERS:
            raise ValueError(
                f"{strict_json.shown(module)} is over the limit of {MAX_LAYERS} layers"
            )
        return int(parts[first])
    if first is None and parts[-1] in EMBEDDINGS:
        return "embedding"
    if first is None and parts[-1] in HEADS:
        return "head"
    raise ValueError(
        f"{strict_json.shown(module)} belongs to no depth: it is in no numbered layer, and no known"
        f" embedding ({', '.join(sorted(EMBEDDINGS))}) or head ({', '.join(sorted(HEADS))})"
    )


def list_name(places: Mapping[str, Where]) -> str | None:
    """What the list of layers is called in its parent, `layers` or `h`; None without any layer.

    Raises ValueError if there is LoRA in more than one list, as in an encoder and a decoder.
    """
    lists = set()
    for module, where in places.items():
        if isinstance(where, int):
            parts = module.split(".")
            lists.add(".".join(parts[: _first_number(parts)]))
    if len(lists) > 1:
        names = ", ".join(map(strict_json.shown, sorted(lists)[:4]))
        raise ValueError(f"expected LoRA in one list of layers, found: {names}")
    return lists.pop().rpartition(".")[2] if lists else None


def _first_number(parts: list[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if part.isascii() and part.isdecimal()), None)


def _is_base_copy(path: str) -> bool:
    """PEFT saves embedding and head themselves beside their LoRA, or where they were resized."""
    module = path.removesuffix(".weight")
    name = module.removesuffix(".base_layer").rpartition(".")[2]
    return module != path and name in EMBEDDINGS | HEADS
