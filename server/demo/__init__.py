"""A small model with three adapters, made by this project and shipped in the package.

The public names say where the files lie. `build` makes the files again, `evaluate` measures them.
Imports no torch, so that asking for a path costs nothing.
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
"""The shipped build: what `python -m server.demo.build` writes by default."""


def model_path(data: Path = DATA) -> Path:
    """The base model's directory: weights, config and tokenizer, in Hugging Face format."""
    return data / "model"


def adapters(data: Path = DATA) -> dict[str, Path]:
    """Each adapter's name and its PEFT checkpoint directory, by name."""
    configs = sorted((data / "adapters").glob("*/adapter_config.json"))
    return {config.parent.name: config.parent for config in configs}


def valid_path(name: str, data: Path = DATA) -> Path:
    """The validation samples of an adapter, from which its depth is to be calibrated."""
    return data / "adapters" / name / "valid.jsonl"


def held_out_path(name: str, data: Path = DATA) -> Path:
    """The test samples of an adapter, which nothing but `evaluate` reads."""
    return data / "adapters" / name / "test.jsonl"
