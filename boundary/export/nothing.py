"""Depth 0 as a checkpoint: an adapter that adds nothing, for servers that must load one.

The smallest cut of the adapter with every `lora_B` set to zero, so that whoever loads the adapter at
all loads this as well, and computes with the base model.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file

from boundary.checkpoint_files import WEIGHTS_NAME
from boundary.export.cut import export

_ADDED = (".lora_B.", ".lora_embedding_B")


def export_nothing(adapter: Path, out: Path, smallest_depth: int, num_layers: int) -> None:
    """Write it to `out`, which must not exist; after an error it may be there in part.

    smallest_depth: at which the adapter has any LoRA. Raises ExportError; DoRA's is not nothing.
    """
    export(adapter, out, smallest_depth, num_layers)
    tensors = load_file(out / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        if any(part in name for part in _ADDED):
            tensor.zero_()
    save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})
