"""The name of an adapter's content, from its files alone: for who has loaded no base that it fits.

`checkpoint` makes the same name while it reads an adapter for a base that is loaded.
"""

from pathlib import Path

from boundary.checkpoint_files import WEIGHTS_NAME
from boundary.export.places import lora_modules
from boundary.fingerprint import EMBEDDING_PARTS, LINEAR_PARTS, AdapterFingerprint
from server.errors import AdapterError
from server.model.adapter_config import AdapterConfig
from server.model.tensor_file import TensorFile


def content_digest(directory: Path) -> str:
    """The digest of the PEFT checkpoint in `directory`, which no base has proved.

    Raises AdapterError for what no base would take: then there is no such digest.
    """
    config = AdapterConfig.read(directory)
    fingerprint = AdapterFingerprint(
        use_rslora=config.use_rslora, use_dora=config.use_dora, lora_bias=config.lora_bias
    )
    with TensorFile(directory / WEIGHTS_NAME) as file:
        try:
            modules = lora_modules(file.entries)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        for name, tensor_names in sorted(modules.items()):
            tensors = {_part(tensor_name): file.read(tensor_name) for tensor_name in tensor_names}
            if "lora_A" not in tensors:
                raise AdapterError(f"{name!r} has no lora_A")
            fingerprint.add(name, config.scaling(name, tensors["lora_A"].shape[0]), tensors)
    return fingerprint.text()


def _part(tensor_name: str) -> str:
    for ending, part in (LINEAR_PARTS | EMBEDDING_PARTS).items():
        if tensor_name.endswith(ending):
            return part
    raise AdapterError(f"tensor {tensor_name!r} is no part of a LoRA that Fathom reproduces")
