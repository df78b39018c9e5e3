"""The compiled kernels of each instruction set that this processor runs, as if it had no more."""

import pytest
import torch

from server.model.native import library
from server.model.native.library import Library

LEVELS = {"x86-64": "DEFAULT", "x86-64-v3": "AVX2", "x86-64-v4": "AVX512"}
"""Of x86, to torch's word for it."""


def library_of(level: str, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Skips the test where the processor does not run it."""
    own = library.load()
    assert isinstance(own, Library)
    if own.level not in LEVELS or list(LEVELS).index(level) > list(LEVELS).index(own.level):
        pytest.skip(f"this processor has no {level}")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: LEVELS[level])
        library.load.cache_clear()
        found = library.load()
        library.load.cache_clear()
    assert isinstance(found, Library)
    assert found.level == level
    return found
