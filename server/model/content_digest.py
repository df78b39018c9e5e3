"""The name of an adapter's content: what its tensors, scalings and variants are, wherever its files lie.

    sha256 over, module by module in order of names: name, scaling, then each part's dtype, shape, bytes

Records of calibrated depths and cache keys rest on it. `checkpoint` computes it while it reads an
adapter for a base that is loaded; `content_digest` from the files alone, for who has no such base.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from boundary.export.places import lora_modules
from server.errors import AdapterError
from server.model.adapter_config import AdapterConfig
from server.model.tensor_file import TensorFile

WEIGHTS_NAME = "adapter_model.safetensors"

# Ending of a tensor's name -> the part of a module that it is.
LINEAR_PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
}
EMBEDDING_PARTS = {
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_magnitude_vector": "magnitude",
}


class ContentDigest:
    """Told one module after the other, in order of their names."""

    def __init__(self, config: AdapterConfig) -> None:
        self._sha256 = hashlib.sha256()
        self._tell(["fathom adapter 1", config.use_rslora, config.use_dora, config.lora_bias])

    def add(self, name: str, scaling: float, tensors: Mapping[str, Tensor]) -> None:
        """One module's tensors by part; contiguous, on the CPU."""
        self._tell([name, scaling])
        for part, tensor in sorted(tensors.items()):
            self._tell([part, str(tensor.dtype), list(tensor.shape)])
            self._sha256.update(tensor.view(torch.uint8).numpy().data)

    def __str__(self) -> str:
        return f"sha256:{self._sha256.hexdigest()}"

    def _tell(self, fields: list[object]) -> None:
        self._sha256.update(json.dumps(fields).encode())


def content_digest(directory: Path) -> str:
    """The digest of the PEFT checkpoint in `directory`, which no base has proved.

    Raises AdapterError for what no base would take: then there is no such digest.
    """
    config = AdapterConfig.read(directory)
    digest = ContentDigest(config)
    with TensorFile(directory / WEIGHTS_NAME) as file:
        try:
            modules = lora_modules(file.entries)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        for name, tensor_names in sorted(modules.items()):
            tensors = {_part(tensor_name): file.read(tensor_name) for tensor_name in tensor_names}
            if "lora_A" not in tensors:
                raise AdapterError(f"{name!r} has no lora_A")
            digest.add(name, config.scaling(name, tensors["lora_A"].shape[0]), tensors)
    return str(digest)


def _part(tensor_name: str) -> str:
    for ending, part in (LINEAR_PARTS | EMBEDDING_PARTS).items():
        if tensor_name.endswith(ending):
            return part
    raise AdapterError(f"tensor {tensor_name!r} is no part of a LoRA that Fathom reproduces")
