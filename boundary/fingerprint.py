"""What the content of a base model and of an adapter is called, wherever their files lie.

A record names both, so that it is never applied to anything else; so whoever makes a record and
whoever applies one must call them alike. Knows no files and no PEFT: it is given configuration and
tensors.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# Ending of a tensor's name in a PEFT checkpoint -> the part of a module that it is.
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

NUM_SAMPLED = 64
"""Elements of each weight of a base model that are looked at."""


def base_fingerprint(
    path: str, config: PreTrainedConfig, tensors: Iterable[tuple[str, Tensor]]
) -> str:
    """A short name for this content of the base model, equal wherever the same files are.

    A hub commit where there is one; else a hash of the configuration and of a sample of each weight
    (64 elements spread over it), which tells checkpoints apart without reading them twice. The
    sample is rounded to bfloat16, so that a float32 and a bfloat16 server name the same files alike.

    path: a directory or a hub id.
    config: as it is in the files: loading a model writes into its own.
    tensors: the model's state by name, in order of names; one after the other, so that they may
        come from files.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit and not Path(path).is_dir():
        return str(commit)
    fields = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # where it lies, and who reads it
        fields.pop(name, None)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // NUM_SAMPLED)
        sample = flat[::step][:NUM_SAMPLED].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    return f"sha256:{digest.hexdigest()[:32]}"


class AdapterFingerprint:
    """A hash of an adapter's tensors, scalings and variants, fed one module after the other.

    use_rslora, use_dora, lora_bias: as in its PEFT config.
    """

    def __init__(self, *, use_rslora: bool, use_dora: bool, lora_bias: bool) -> None:
        self._digest = hashlib.sha256()
        self._tell(["fathom adapter 1", use_rslora, use_dora, lora_bias])

    def add(self, name: str, scaling: float, parts: Mapping[str, Tensor]) -> None:
        """The next module in the order of names.

        name: the base model's name for it.
        parts: by `LINEAR_PARTS` or `EMBEDDING_PARTS`; CPU, contiguous, in the checkpoint's dtype.
        """
        self._tell([name, scaling])
        for part, tensor in sorted(parts.items()):
            self._tell([part, str(tensor.dtype), list(tensor.shape)])
            self._digest.update(tensor.view(torch.uint8).numpy().data)

    def text(self) -> str:
        """`sha256:<hex>` of all modules so far."""
        return f"sha256:{self._digest.hexdigest()}"

    def _tell(self, fields: list[object]) -> None:
        self._digest.update(json.dumps(fields).encode())
