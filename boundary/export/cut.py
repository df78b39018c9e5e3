"""An adapter cut at a depth, as a plain PEFT checkpoint that anyone can load.

What is on at the depth (see `depth.lora_depth`) is kept as it is, every other LoRA module is left
out whole, and the config is narrowed to what is left: the copy computes what the original computes
at that depth, and needs nothing but PEFT. Reads and writes `adapter_config.json` and
`adapter_model.safetensors`, never a pickle; knows no base model.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from boundary import strict_json
from boundary.checkpoint_files import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    PICKLE_REFUSED,
    PREFIX,
    WEIGHTS_NAME,
    has_only_a_pickle,
)
from boundary.export.narrowing import narrow
from boundary.export.places import Where, list_name, lora_modules, needed_depth, where_of

UNCUTTABLE = {
    "layer_replication": "it repeats layers of the base model, so depth has no meaning",
    "modules_to_save": "whole modules of the base are replaced, which belong to no depth",
    "target_parameters": "PEFT applies it to every layer, whatever layers_to_transform says",
    "trainable_token_indices": "it replaces rows of the embedding, which belong to no depth",
}


class ExportError(ValueError):
    """An adapter that is not exported, and why. `about` is what to change: adapter, depth or out."""

    def __init__(self, message: str, about: Literal["adapter", "depth", "out"] = "adapter") -> None:
        super().__init__(message)
        self.about = about


@dataclass(frozen=True, slots=True)
class Export:
    """What was written.

    num_layers: as given, or one more than the highest layer with LoRA.
    layers_kept, layers_dropped: layers that have LoRA, in order.
    num_bytes_before, num_bytes_after: sizes of the two files of weights.
    notes: what else was changed, one sentence each.
    """

    depth: int
    num_layers: int
    layers_kept: tuple[int, ...]
    layers_dropped: tuple[int, ...]
    num_tensors_before: int
    num_tensors_after: int
    num_bytes_before: int
    num_bytes_after: int
    notes: tuple[str, ...]


def export(
    adapter: Path, out: Path, depth: int | Literal["full"], num_layers: int | None = None
) -> Export:
    """Write the checkpoint in directory `adapter`, cut at `depth`, to the directory `out`.

    num_layers: of the base model; without it the adapter's highest layer counts as the last one.

    `out` must not exist or be empty; it is there complete or, after any error, not at all. Where
    the cut leaves nothing out, both files are copied byte for byte. Raises ExportError.
    """
    out = free_place(out)
    content = _read(adapter)
    config = _checked(content)
    names = _tensor_names(adapter)
    try:
        modules = lora_modules(names)
        places = {name: where_of(name) for name in modules}
        layers_name = list_name(places)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if not modules:
        raise ExportError(f"{WEIGHTS_NAME} holds no LoRA")
    depth, num_layers = _resolve(depth, num_layers, places.values())
    kept = {name for name, where in places.items() if needed_depth(where, num_layers) <= depth}
    if not kept:
        raise ExportError(
            f"no LoRA of this adapter lies below {depth}: what is left is the base model", "depth"
        )
    renamed, notes = _kept_tensors(names, modules, kept)
    is_cut = len(kept) < len(modules)
    if is_cut:
        layers = {name: where if isinstance(where, int) else None for name, where in places.items()}
        try:
            narrowed = narrow(config, layers, kept, layers_name)
        except ValueError as error:
            raise ExportError(f"{CONFIG_NAME}: {error}") from error
        content = json.dumps(narrowed.config, indent=2, ensure_ascii=False).encode() + b"\n"
        notes += narrowed.notes
    elif depth < num_layers:
        notes += ("nothing is left out: the adapter reaches no deeper",)
    num_bytes = _write(adapter / WEIGHTS_NAME, renamed if is_cut else None, content, out)
    found = {where for where in places.values() if isinstance(where, int)}
    return Export(
        depth=depth,
        num_layers=num_layers,
        layers_kept=tuple(sorted(layer for layer in found if layer < depth)),
        layers_dropped=tuple(sorted(layer for layer in found if layer >= depth)),
        num_tensors_before=len(names),
        num_tensors_after=len(renamed),
        num_bytes_before=(adapter / WEIGHTS_NAME).stat().st_size,
        num_bytes_after=num_bytes,
        notes=notes,
    )


def free_place(out: Path) -> Path:
    """`out` as an absolute path, where an export could go: missing, or an empty directory.

    Raises ExportError. To know it early; `export` asks itself.
    """
    out = Path(os.path.abspath(out))
    try:
        if out.is_symlink():
            raise ExportError(f"{str(out)!r} is a symbolic link; name the directory itself", "out")
        if not out.parent.is_dir():
            raise ExportError(f"{str(out.parent)!r} is not a directory", "out")
        if out.exists() and not out.is_dir():
            raise ExportError(f"{str(out)!r} exists and is not a directory", "out")
        if out.exists() and any(out.iterdir()):
            raise ExportError(f"{str(out)!r} is not empty", "out")
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be used: {error.strerror}", "out") from error
    return out


def _read(adapter: Path) -> bytes:
    try:
        return strict_json.read_file(adapter / CONFIG_NAME, MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _checked(content: bytes) -> dict[str, Any]:
    try:
        config = strict_json.parse(content)
    except ValueError as error:
        raise ExportError(f"{CONFIG_NAME} {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{CONFIG_NAME} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise _wrong(config, "peft_type", "only LoRA can be cut at a depth")
    if config.get("bias") not in (None, "none"):
        raise _wrong(config, "bias", "it changes biases of the base, which belong to no depth")
    for field, why in UNCUTTABLE.items():
        if config.get(field):
            raise _wrong(config, field, why)
    wanted = config.get("target_modules")
    if not isinstance(wanted, str) and not _are_strings(wanted):
        raise _wrong(config, "target_modules", "it must be a pattern or a list of names")
    pattern = config.get("layers_pattern")
    if not isinstance(pattern, str | None) and not _are_strings(pattern):
        raise _wrong(config, "layers_pattern", "it must be a pattern or a list of them")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field), dict | None):
            raise _wrong(config, field, "it must be an object")
    return config


def _tensor_names(adapter: Path) -> list[str]:
    path = adapter / WEIGHTS_NAME
    if has_only_a_pickle(adapter):
        raise ExportError(PICKLE_REFUSED)
    if not path.is_file():  # opening a pipe would wait for ever
        raise ExportError(f"{WEIGHTS_NAME} is missing or not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{WEIGHTS_NAME} cannot be read: {error}") from error


def _resolve(
    depth: int | Literal["full"], num_layers: int | None, places: Iterable[Where]
) -> tuple[int, int]:
    """Depth and number of layers as numbers that fit the adapter."""
    places = set(places)
    reach = 1 + max((where for where in places if isinstance(where, int)), default=-1)
    known = num_layers is not None
    if num_layers is None:
        if reach == 0:
            raise ExportError("it has LoRA in no layer: the model must tell how many it has")
        num_layers = reach
    if reach > num_layers:
        raise ExportError(
            f"it has LoRA in layer {reach - 1}, but the model has {num_layers} layers: it was made"
            " for another base"
        )
    if depth == "full":
        return num_layers, num_layers
    if depth == 0:
        raise ExportError("0 is the base model, for which no adapter is needed", "depth")
    if not 0 < depth <= num_layers:
        layers = f"the {num_layers} layers of the model"
        if not known:
            layers = f"{num_layers}, the highest layer with LoRA; the model may have more"
        raise ExportError(f"must be from 1 to {layers}, got {depth}", "depth")
    if not known and depth == num_layers and "head" in places:
        raise ExportError(
            f"it has LoRA on the output head, and the model must tell if {depth} is full depth"
        )
    return depth, num_layers


def _kept_tensors(
    names: Iterable[str], modules: Mapping[str, list[str]], kept: Iterable[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of the tensors that stay -> their names in the copy, with what is to be said of them."""
    dropped = {tensor for name in modules.keys() - set(kept) for tensor in modules[name]}
    renamed: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        if name in dropped:
            continue
        renamed[name] = name
        module = name.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        if module in modules and module not in kept:
            # Without LoRA the module has no `base_layer`, but its weight may still be a changed one.
            renamed[name] = f"{PREFIX}{module}.weight"
            notes.append(f"the copy of the base's {module} that PEFT saved is kept")
    return renamed, tuple(notes)


def _write(weights: Path, renamed: Mapping[str, str] | None, config: bytes, out: Path) -> int:
    """Both files under a temporary name, then all at once; returns the size of the weights.

    renamed: tensors to keep -> names in the copy; None copies the file.
    """
    beside = out.with_name(f".export-{secrets.token_hex(8)}")
    copy = beside / WEIGHTS_NAME
    try:
        beside.mkdir()
        try:
            if renamed is None:
                shutil.copyfile(weights, copy)
            else:
                with safe_open(weights, framework="pt") as file:
                    tensors = {new: file.get_tensor(old) for old, new in renamed.items()}
                    save_file(tensors, copy, metadata=file.metadata())
            (beside / CONFIG_NAME).write_bytes(config)
            for path in (copy, beside / CONFIG_NAME, beside):
                _sync(path)
            num_bytes = copy.stat().st_size
            os.rename(beside, out)  # over an empty directory, and over nothing else
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _sync(out.parent)
    except OSError as error:
        raise ExportError(f"{str(out)!r} cannot be written: {error.strerror}", "out") from error
    except SafetensorError as error:
        raise ExportError(f"{WEIGHTS_NAME} cannot be copied: {error}") from error
    return num_bytes


def _sync(path: Path) -> None:
    """A rename that outlives a power cut is worth nothing if the content does not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wrong(config: Mapping[str, Any], field: str, why: str) -> ExportError:
    return ExportError(f"{CONFIG_NAME}: {field} is {strict_json.shown(config.get(field))}: {why}")


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
