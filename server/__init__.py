"""Fathom: one base language model, many LoRA adapters, a depth for every request."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fathom-lora")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
