"""Boundary: how deep a LoRA adapter has to reach.

A library of its own: it takes a model and a tokenizer, and imports nothing of the server.

    found = boundary.calibrate(model, tokenizer, samples)    a PEFT model and validation samples
    with boundary.lora_depth(model, found.depth): ...        the same model, cut there
    found.save("adapters/sql")                               boundary.json beside the weights
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from boundary.depth import lora_depth as lora_depth
    from boundary.notebook.calibrate import calibrate as calibrate
    from boundary.notebook.calibrated import Calibrated as Calibrated
    from boundary.options import CalibrationOptions as CalibrationOptions
    from boundary.record import BoundaryRecord as BoundaryRecord
    from boundary.report.card import update_card as update_card

_HOMES = {
    "BoundaryRecord": "boundary.record",
    "CalibrationOptions": "boundary.options",
    "Calibrated": "boundary.notebook.calibrated",
    "calibrate": "boundary.notebook.calibrate",
    "lora_depth": "boundary.depth",
    "update_card": "boundary.report.card",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """What notebooks use, imported when first wanted: a server that reads records needs no PEFT."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'boundary' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
