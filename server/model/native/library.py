"""The compiled kernels: found beside this file, checked, and given torch's threads.

`.ci/compile_kernels.py` builds them when Fathom is installed, one library for each level of the
processor's instruction set. Where none was built, or the processor is another, `load` says why and the
callers use torch's operators instead: the same results, more slowly.

Calls go through ctypes, which lets go of the GIL meanwhile.
"""

import ctypes
import platform
import re
from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from server.model.native.structures import SIZES, Pass, Step

_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""torch's word for what the processor has -> the level that is compiled for it."""

STEPS = (
    "fathom_chain",
    "fathom_gather",
    "fathom_map",
    "fathom_keep_rows",
    "fathom_product",
    "fathom_plain_product",
    "fathom_int8_product",
    "fathom_attention_layer",
    "fathom_lora",
    "fathom_lora_layer",
)
"""Kernels: each is a step, which some threads do together. Those named after a layer or rows need a
`Pass`."""


@dataclass(frozen=True, slots=True)
class Library:
    """One loaded library."""

    level: str
    functions: ctypes.CDLL
    product_strip: int
    """Outputs of a packed weight that lie together."""
    int8_lanes: int
    """Of a block of packed int8 weights, outputs this far apart lie together."""
    has_team: bool
    """Whether its work is shared by torch's threads; else the caller does it alone."""
    addresses: Mapping[str, int]
    """Of each of `STEPS`."""

    def run(self, kernel: str, call: Structure, num_threads: int, told: Pass | None = None) -> None:
        """One step by itself. told: the pass that it belongs to, for one that is a layer's."""
        step = Step(self.addresses[kernel], ctypes.addressof(call))
        address = None if told is None else ctypes.addressof(told)
        self.functions.fathom_run_steps(ctypes.addressof(step), 1, num_threads, address)


@cache
def load() -> Library | str:
    """The library for this processor, or the reason why there is none."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "x86-64")
    else:
        level = machine
    path = Path(__file__).with_name(f"kernels-{level}.so")
    if not path.is_file():
        return f"no kernels were compiled for {level} when Fathom was installed"
    try:
        functions = ctypes.CDLL(str(path))
        sizes = {name: c_int64.in_dll(functions, name).value for name in SIZES}
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if sizes != SIZES:
        return f"{path.name} was compiled from other sources: install Fathom again"
    functions.fathom_use_team.argtypes = (c_void_p,)
    functions.fathom_use_team.restype = None
    functions.fathom_run_steps.argtypes = (c_void_p, c_int64, c_int64, c_void_p)
    functions.fathom_run_steps.restype = None
    strip = c_int64.in_dll(functions, "fathom_product_strip").value
    lanes = c_int64.in_dll(functions, "fathom_int8_lanes").value
    addresses = {kernel: _address(getattr(functions, kernel)) for kernel in STEPS}
    return Library(level, functions, strip, lanes, _share_team(functions), addresses)


def _share_team(functions: ctypes.CDLL) -> bool:
    """Tell the library where torch's OpenMP is, if this process says so."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return False
    found = re.search(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps.read_text())
    if found is None:
        return False
    try:
        parallel = ctypes.CDLL(found[0]).GOMP_parallel
    except (OSError, AttributeError):
        return False
    functions.fathom_use_team(_address(parallel))
    return True


def _address(function: object) -> int:
    return ctypes.cast(function, c_void_p).value or 0  # type: ignore[arg-type]
