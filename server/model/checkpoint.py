"""A PEFT LoRA checkpoint, read from disk, proved against the base model, or refused.

    y = module(x) + scaling * (B A x + bias)                                     LoRA
    y = module(x) + (gain - 1) * (module(x) - base bias) + gain * scaling * B A x    DoRA

The formulas are what each module of a checkpoint means; `lora` applies them. Here every tensor in
the file is accounted for: it belongs to a module that the config targets and the base has, with
the shape that module needs, finite, and with its partners. What would change the result in any
other way is refused with an `AdapterError` that names the tensor or the config field.

Called by `adapters` on a loader thread. Knows no names of adapters, no slots, no requests. Reads
only `adapter_config.json` and `adapter_model.safetensors`; nothing is ever unpickled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from boundary.checkpoint_files import PICKLE_REFUSED, PREFIX, WEIGHTS_NAME, has_only_a_pickle
from boundary.fingerprint import EMBEDDING_PARTS, LINEAR_PARTS, AdapterFingerprint
from server.errors import AdapterError
from server.model.adapter_config import AdapterConfig
from server.model.dora import dora_gain
from server.model.targets import Target, Targets
from server.model.tensor_file import TensorFile

MAX_RANK = 4096

# PEFT also saves the base weight of a targeted embedding or lm_head.
BASE_ENDINGS = (".base_layer.weight", ".weight")


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One target module of one adapter: host tensors, CPU, in the checkpoint's dtype.

    lora_A: [rank, in_features], of an embedding [rank, num_embeddings].
    lora_B: [out_features, rank], of an embedding [embedding_dim, rank]. It lies in memory transposed, as
        products over few rows read it.
    scaling: alpha / rank or, with rsLoRA, alpha / sqrt(rank), after alpha_pattern.
    bias: [out_features], lora_bias; it is inside the scaling, as in PEFT.
    magnitude: [out_features], DoRA's m as stored.
    gain: [out_features], float32, DoRA's m / ||W + scaling B A|| by rows, from the base weight.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    magnitude: Tensor | None
    gain: Tensor | None


@dataclass(frozen=True, slots=True)
class LoraCheckpoint:
    """What a validated checkpoint says, whatever name it is served under.

    modules: keyed by the base model's module name, "model.layers.0.self_attn.q_proj".
    layers: module name -> layer_idx; the embedding is -1 (depth >= 1), lm_head `num_layers`.
    rank: the largest rank of a module.
    max_depth: the smallest depth that applies the whole adapter.
    digest: "sha256:<hex>" of tensors, scalings and variants; the same wherever the files lie.
    num_bytes: host memory of all tensors.
    base_model: base_model_name_or_path, as written; not compared with anything.
    """

    modules: dict[str, LoraModule]
    layers: dict[str, int]
    rank: int
    max_depth: int
    digest: str
    num_bytes: int
    base_model: str | None


def read_checkpoint(
    path: Path, targets: Targets, *, max_rank: int = MAX_RANK, root: Path | None = None
) -> LoraCheckpoint:
    """Read the PEFT checkpoint in directory `path` for the base model of `targets`.

    Before any tensor is read, each is known to have the shape that its module and a rank of at most
    `max_rank` give it, so that however much the file says it holds, no more memory than that is
    taken. With a `root`, no file outside of it is opened, whatever links say.

    Raises `AdapterError` for everything that is wrong with the checkpoint, and nothing else.
    """
    config = AdapterConfig.read(path, root)
    refuse_pickle(path)
    with TensorFile(path / WEIGHTS_NAME, root) as file:
        parts, base_copies = sort_out(file, config, targets, max_rank)
        _check_base_copies(file, base_copies, targets)
        return _load(file, parts, config, targets)


def refuse_pickle(path: Path) -> None:
    """Raise AdapterError where the weights in directory `path` are a pickle."""
    if has_only_a_pickle(path):
        raise AdapterError(PICKLE_REFUSED)


def sort_out(
    file: TensorFile, config: AdapterConfig, targets: Targets, max_rank: int
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Give every tensor of the file its place.

    Returns module name -> part -> tensor name, and tensor name -> module name for copies of base
    weights. Looks at names, dtypes and shapes only: a file that does not fit costs no memory.
    """
    targeted = config.targeted(targets)
    for name in sorted(targeted - targets.keys()):
        raise AdapterError(
            f"adapter_config.json: target_modules names {name!r}, {targets.why_not(name)}"
        )
    parts: dict[str, dict[str, str]] = {name: {} for name in sorted(targeted)}
    base_copies: dict[str, str] = {}
    for tensor_name in sorted(file.entries):
        name, part = _place(tensor_name, targets)
        if part is None:
            base_copies[tensor_name] = name
        elif name in targeted:
            parts[name][part] = tensor_name
        else:
            raise AdapterError(
                f"tensor {tensor_name!r}: adapter_config.json (target_modules, exclude_modules, "
                f"layers_to_transform) does not target {name!r}"
            )
    if not parts:
        raise AdapterError(
            "the adapter is empty: target_modules in adapter_config.json targets no module of "
            "this base, and the file holds no LoRA"
        )
    for name, tensor_names in parts.items():
        _check_complete(name, tensor_names, config, targets[name])
        _check_shapes(name, tensor_names, config, targets[name], file, max_rank)
    return parts, base_copies


def _place(tensor_name: str, targets: Targets) -> tuple[str, str | None]:
    """Tell the module and the part that a tensor's name means; no part: a copy of its weight."""
    path = tensor_name.removeprefix(PREFIX)
    if path == tensor_name:
        raise AdapterError(f"tensor {tensor_name!r} does not begin with {PREFIX!r}")
    for ending, part in (LINEAR_PARTS | EMBEDDING_PARTS).items():
        name = path.removesuffix(ending)
        if name == path:
            continue
        if name not in targets:
            raise AdapterError(f"tensor {tensor_name!r} is for {name!r}, {targets.why_not(name)}")
        expected = EMBEDDING_PARTS if targets[name].kind == "embedding" else LINEAR_PARTS
        if ending not in expected:
            raise AdapterError(
                f"tensor {tensor_name!r}: {name!r} is of kind {targets[name].kind}, which takes "
                f"{', '.join(expected)}"
            )
        return name, part
    for ending in BASE_ENDINGS:
        name = path.removesuffix(ending)
        if name != path and name in targets and targets[name].kind in ("embedding", "lm_head"):
            return name, None
    raise AdapterError(
        f"tensor {tensor_name!r} is no part of a LoRA that this server reproduces "
        f"({', '.join(LINEAR_PARTS | EMBEDDING_PARTS)})"
    )


def _check_complete(
    name: str, tensor_names: dict[str, str], config: AdapterConfig, target: Target
) -> None:
    is_embedding = target.kind == "embedding"
    if is_embedding and config.use_dora:
        raise AdapterError(f"use_dora on the embedding {name!r} is not served")
    if is_embedding and config.lora_bias:
        raise AdapterError(f"lora_bias on the embedding {name!r}: PEFT has no such LoRA")
    wanted = {"lora_A", "lora_B"}
    wanted |= {"bias"} if config.lora_bias else set()
    wanted |= {"magnitude"} if config.use_dora else set()
    for ending, part in (EMBEDDING_PARTS if is_embedding else LINEAR_PARTS).items():
        if part in wanted and part not in tensor_names:
            raise AdapterError(
                f"tensor {PREFIX + name + ending!r} is missing, but adapter_config.json asks for it"
            )
        if part in tensor_names and part not in wanted:
            field = "lora_bias" if part == "bias" else "use_dora"
            raise AdapterError(
                f"tensor {tensor_names[part]!r} is there, but {field} is off in adapter_config.json"
            )


def _check_shapes(
    name: str,
    tensor_names: dict[str, str],
    config: AdapterConfig,
    target: Target,
    file: TensorFile,
    max_rank: int,
) -> None:
    lora_A = file.entries[tensor_names["lora_A"]].shape
    rank = lora_A[0] if lora_A else 0  # a scalar is caught with the other wrong shapes
    if rank > max_rank:
        setting = f": max_lora_rank is {max_rank}" if max_rank < MAX_RANK else ""
        raise AdapterError(
            f"tensor {tensor_names['lora_A']!r}: rank {rank} is over the limit of {max_rank}{setting}"
        )
    expected = {
        "lora_A": (rank, target.in_features),
        "lora_B": (target.out_features, rank),
        "bias": (target.out_features,),
        "magnitude": (target.out_features,),
    }
    for part, tensor_name in tensor_names.items():
        shape = file.entries[tensor_name].shape
        if shape != expected[part]:
            raise AdapterError(
                f"tensor {tensor_name!r} has shape {list(shape)}, but {name!r} of this base "
                f"({target.in_features} -> {target.out_features}) needs {list(expected[part])}"
            )
    if rank != config.rank(name):
        raise AdapterError(
            f"tensor {tensor_names['lora_A']!r} has rank {rank}, but r and rank_pattern in "
            f"adapter_config.json say {config.rank(name)}"
        )


def _check_base_copies(file: TensorFile, base_copies: dict[str, str], targets: Targets) -> None:
    """Refuse a checkpoint whose embedding or lm_head is not the base's own.

    PEFT saves these weights beside the LoRA; it also does so when they were resized or trained,
    and that would be another base model. Equal means: in the coarser of the two dtypes.
    """
    for tensor_name, name in base_copies.items():
        target = targets[name]
        shape = [target.out_features, target.in_features]
        if target.kind == "embedding":
            shape.reverse()
        if list(file.entries[tensor_name].shape) != shape:
            raise AdapterError(
                f"tensor {tensor_name!r} has shape {list(file.entries[tensor_name].shape)}, but "
                f"{name!r} of this base has {shape}: the adapter resized its base"
            )
        copy, weight = file.read(tensor_name), target.weight().cpu()
        if not torch.equal(copy.to(weight.dtype), weight) and not torch.equal(
            copy, weight.to(copy.dtype)
        ):
            raise AdapterError(
                f"tensor {tensor_name!r} differs from {name!r} of this base: the adapter was made "
                "for another base, or trained this weight whole, which is no LoRA"
            )


def _load(
    file: TensorFile, parts: dict[str, dict[str, str]], config: AdapterConfig, targets: Targets
) -> LoraCheckpoint:
    modules: dict[str, LoraModule] = {}
    fingerprint = AdapterFingerprint(
        use_rslora=config.use_rslora, use_dora=config.use_dora, lora_bias=config.lora_bias
    )
    num_bytes = 0
    for name, tensor_names in parts.items():
        tensors = {part: file.read(tensor_names[part]) for part in sorted(tensor_names)}
        rank = tensors["lora_A"].shape[0]
        scaling = config.scaling(name, rank)
        fingerprint.add(name, scaling, tensors)
        magnitude = tensors.get("magnitude")
        gain = None
        if magnitude is not None:
            gain = dora_gain(
                targets[name], tensors["lora_A"], tensors["lora_B"], scaling, magnitude
            )
            if not bool(torch.isfinite(gain).all()):
                raise AdapterError(
                    f"tensor {tensor_names['magnitude']!r}: a row of W + scaling B A of {name!r} "
                    "has no length, so DoRA's gain is not finite"
                )
        lora_B = tensors["lora_B"].t().contiguous().t()
        modules[name] = module = LoraModule(
            tensors["lora_A"], lora_B, scaling, tensors.get("bias"), magnitude, gain
        )
        num_bytes += sum(t.nbytes for t in (*tensors.values(), module.gain) if t is not None)
    layers = {name: targets[name].layer_idx for name in modules}
    return LoraCheckpoint(
        modules=modules,
        layers=layers,
        rank=max(module.lora_A.shape[0] for module in modules.values()),
        max_depth=max_depth(modules, targets),
        digest=fingerprint.text(),
        num_bytes=num_bytes,
        base_model=config.base_model,
    )


def max_depth(names: Iterable[str], targets: Targets) -> int:
    """The smallest depth that applies LoRA in all these modules."""
    highest = max(targets[name].layer_idx for name in names)
    return min(max(1, 1 + highest), targets.num_layers)


def module_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """The last parts of module names, each once: `q_proj` for every layer's."""
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def lora_layers(names: Iterable[str], targets: Targets) -> tuple[int, ...]:
    """The decoder layers that hold any of these modules; embedding and `lm_head` lie in none."""
    found = {targets[name].layer_idx for name in names}
    return tuple(sorted(found & set(range(targets.num_layers))))
