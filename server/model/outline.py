"""What config and header say of a checkpoint whose weights nobody has read.

Thousands of adapters are often of one recipe: then config and header are the same bytes in each, and
are parsed and proved once.
"""

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock

from boundary.checkpoint_files import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from server.errors import AdapterError
from server.model.adapter_config import AdapterConfig
from server.model.checkpoint import (
    MAX_RANK,
    lora_layers,
    max_depth,
    module_kinds,
    refuse_pickle,
    sort_out,
)
from server.model.targets import Targets
from server.model.tensor_file import MAX_HEADER_BYTES, TensorFile, open_regular

_MAX_PROVED = 256
"""Recipes that are remembered, the first forgotten first."""


@dataclass(frozen=True, slots=True)
class CheckpointOutline:
    """Fields as of `LoraCheckpoint`."""

    rank: int
    max_depth: int
    num_bytes: int
    modules: tuple[str, ...]
    """Kinds of module, `q_proj` for every layer's."""
    layers: tuple[int, ...]
    """Decoder layers that have LoRA."""


class OutlineReader:
    """Outlines of adapters for one base model, on any thread."""

    def __init__(self, targets: Targets, max_rank: int = MAX_RANK) -> None:
        self._targets = targets
        self._max_rank = max_rank
        self._proved: OrderedDict[bytes, CheckpointOutline] = OrderedDict()
        self._lock = Lock()

    def read(self, path: Path) -> CheckpointOutline:
        """Of the checkpoint in directory `path`. Raises as `read_outline`."""
        key = _fingerprint(path)
        with self._lock:
            found = self._proved.get(key) if key is not None else None
        if found is not None:
            return found
        found = read_outline(path, self._targets, self._max_rank)
        # Where somebody writes these files meanwhile, what was proved may not be what was compared.
        if key is not None and _fingerprint(path) == key:
            with self._lock:
                self._proved[key] = found
                while len(self._proved) > _MAX_PROVED:
                    self._proved.popitem(last=False)
        return found


def read_outline(path: Path, targets: Targets, max_rank: int = MAX_RANK) -> CheckpointOutline:
    """Prove names, dtypes and shapes as `read_checkpoint` does, and read no weight.

    Raises `AdapterError` for what they show to be wrong; the values may still be refused later.
    """
    config = AdapterConfig.read(path)
    refuse_pickle(path)
    with TensorFile(path / WEIGHTS_NAME) as file:
        parts, _ = sort_out(file, config, targets, max_rank)
        num_bytes = 0
        for name, tensor_names in parts.items():
            entries = [file.entries[tensor_name] for tensor_name in tensor_names.values()]
            num_bytes += sum(entry.end - entry.begin for entry in entries)
            num_bytes += targets[name].out_features * 4 if config.use_dora else 0  # its gain
        return CheckpointOutline(
            rank=max(file.entries[names["lora_A"]].shape[0] for names in parts.values()),
            max_depth=max_depth(parts, targets),
            num_bytes=num_bytes,
            modules=module_kinds(parts),
            layers=lora_layers(parts, targets),
        )


def _fingerprint(path: Path) -> bytes | None:
    """Of all bytes that an outline depends on; None where `read_outline` has to say what is wrong."""
    digest = blake2b(digest_size=32)
    try:
        for name, limit in ((CONFIG_NAME, MAX_CONFIG_BYTES), (WEIGHTS_NAME, MAX_HEADER_BYTES)):
            file, size = open_regular(path / name)
            with file:
                length = size if name == CONFIG_NAME else int.from_bytes(file.read(8), "little")
                if length > limit:
                    return None
                digest.update(f"{size} {length} ".encode())
                digest.update(file.read(length))
    except (AdapterError, OSError):
        return None
    return digest.digest()
