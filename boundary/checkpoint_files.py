"""The two files of a PEFT checkpoint, what their tensors' names begin with, and the file that is never read.

Names only: loads neither torch nor PEFT.
"""

import os
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the base model's names."""
MAX_CONFIG_BYTES = 1 << 20

PICKLE_REFUSED = (
    f"{PICKLE_NAME} is a pickle, which can run code when read, and is never opened: save the adapter as"
    f" {WEIGHTS_NAME} (safe_serialization=True)"
)


def has_only_a_pickle(directory: Path) -> bool:
    """Whether the weights are there, but in no form that is read."""
    return not os.path.lexists(directory / WEIGHTS_NAME) and os.path.lexists(
        directory / PICKLE_NAME
    )
