"""The compiled kernels: found beside this file, checked, and given torch's threads.

`.ci/compile_kernels.py` builds them when Fathom is installed, one library for each level of the
processor's instruction set. Where none was built, or the processor is another, `load` says why and the
callers use torch's operators instead: the same results, more slowly.

Calls go through ctypes, which lets go of the GIL meanwhile.
"""

import ctypes
import platform
import re
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p, sizeof
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from pathlib import Path

import torch

_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
"""torch's word for what the processor has -> the level that is compiled for it."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The kernels' element types, as `vector.h` numbers them."""


class AttentionCall(Structure):
    """`struct attention` of `paged_attention.c`, which says what each field is."""

    _fields_ = (
        ("out", c_void_p),
        ("query", c_void_p),
        ("query_seq_stride", c_int64),
        ("query_head_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_table", c_void_p),
        ("kv_lens", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("num_seqs", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("dtype", c_int),
        ("num_threads", c_int),
    )


class LoraWeightsEntry(Structure):
    """`struct lora_weights` of `lora.c`."""

    _fields_ = (
        ("lora_A", c_void_p),
        ("lora_B", c_void_p),
        ("bias", c_void_p),
        ("gain", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
    )


class LoraPart(Structure):
    """`struct lora_part` of `lora.c`."""

    _fields_ = (
        ("weights", c_void_p),
        ("base_bias", c_void_p),
        ("column", c_int64),
        ("out_features", c_int64),
        ("low_column", c_int64),
    )


class LoraCall(Structure):
    """`struct lora` of `lora.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("parts", c_void_p),
        ("segments", c_void_p),
        ("num_parts", c_int64),
        ("num_segments", c_int64),
        ("in_features", c_int64),
        ("low", c_void_p),
        ("low_stride", c_int64),
        ("dtype", c_int),
        ("num_threads", c_int),
    )


class ChainOperandEntry(Structure):
    """`struct chain_operand` of `chain.c`."""

    _fields_ = (
        ("address", c_void_p),
        ("strides", c_int64 * 4),
        ("dtype", c_int64),
    )


class ChainOp(Structure):
    """`struct chain_op` of `chain.c`."""

    _fields_ = (
        ("code", c_int32),
        ("kind", c_int32),
        ("out", c_int32),
        ("a", c_int32),
        ("b", c_int32),
        ("length", c_int32),
        ("value", c_float),
        ("unused", c_int32),
    )


class ChainCall(Structure):
    """`struct chain` of `chain.c`."""

    _fields_ = (
        ("operands", c_void_p),
        ("ops", c_void_p),
        ("num_ops", c_int64),
        ("sizes", c_int64 * 4),
        ("num_vectors", c_int64),
        ("num_floats", c_int64),
        ("num_threads", c_int64),
    )


class ProductCall(Structure):
    """`struct product` of `product.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("num_rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("block_stride", c_int64),
        ("num_threads", c_int64),
    )


class Int8ProductCall(Structure):
    """`struct int8_product` of `int8_product.c`."""

    _fields_ = (
        ("y", c_void_p),
        ("x", c_void_p),
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("y_stride", c_int64),
        ("x_stride", c_int64),
        ("num_rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int64),
        ("num_threads", c_int64),
    )


INT8_BLOCK = 64
"""Outputs that lie together in packed int8 weights, as `int8_product.c` reads them."""


class Code(IntEnum):
    """`enum code` of `chain.c`."""

    LOAD = 0
    STORE = auto()
    COPY = auto()
    ADD = auto()
    SUB = auto()
    MUL = auto()
    DIV = auto()
    NEG = auto()
    SQUARE = auto()
    RSQRT = auto()
    MEAN = auto()
    SIGMOID = auto()
    SILU = auto()
    TANH = auto()
    GELU_TANH = auto()
    RELU = auto()
    ROUND = auto()


class Kind(IntEnum):
    """What a chain operator's second argument is, as `chain.c` numbers it."""

    VECTOR = 0
    FIRST = 1
    CONSTANT = 2


_SIZES = {
    "fathom_sizeof_attention": sizeof(AttentionCall),
    "fathom_sizeof_lora_weights": sizeof(LoraWeightsEntry),
    "fathom_sizeof_lora_part": sizeof(LoraPart),
    "fathom_sizeof_lora": sizeof(LoraCall),
    "fathom_sizeof_chain": sizeof(ChainCall),
    "fathom_sizeof_chain_op": sizeof(ChainOp),
    "fathom_sizeof_chain_operand": sizeof(ChainOperandEntry),
    "fathom_num_chain_codes": len(Code),
    "fathom_sizeof_product": sizeof(ProductCall),
    "fathom_sizeof_int8_product": sizeof(Int8ProductCall),
    "fathom_int8_block": INT8_BLOCK,
}
"""What a library that was compiled from sources which fit this file says of its structures."""


@dataclass(frozen=True, slots=True)
class Library:
    """One loaded library."""

    level: str
    functions: ctypes.CDLL
    int8_lanes: int
    """Of a block of packed int8 weights, outputs this far apart lie together."""
    has_team: bool
    """Whether its work is shared by torch's threads; else the caller does it alone."""


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
        sizes = {name: c_int64.in_dll(functions, name).value for name in _SIZES}
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if sizes != _SIZES:
        return f"{path.name} was compiled from other sources: install Fathom again"
    functions.fathom_use_team.argtypes = (c_void_p, c_void_p)
    functions.fathom_use_team.restype = None
    functions.fathom_attend_decodes.argtypes = (POINTER(AttentionCall),)
    functions.fathom_attend_decodes.restype = None
    functions.fathom_lora.argtypes = (POINTER(LoraCall),)
    functions.fathom_lora.restype = None
    functions.fathom_product.argtypes = (c_void_p,)
    functions.fathom_product.restype = None
    functions.fathom_int8_product.argtypes = (c_void_p,)
    functions.fathom_int8_product.restype = None
    functions.fathom_run_chain.argtypes = (c_void_p,)
    functions.fathom_run_chain.restype = None
    functions.fathom_write_kv.argtypes = (
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        *(c_int64, c_int64, c_int64, c_int),
    )
    functions.fathom_write_kv.restype = None
    lanes = c_int64.in_dll(functions, "fathom_int8_lanes").value
    return Library(level, functions, lanes, _share_team(functions))


def _share_team(functions: ctypes.CDLL) -> bool:
    """Tell the library where torch's OpenMP is, if this process says so."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return False
    found = re.search(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps.read_text())
    if found is None:
        return False
    try:
        openmp = ctypes.CDLL(found[0])
        parallel, barrier = openmp.GOMP_parallel, openmp.GOMP_barrier
    except (OSError, AttributeError):
        return False
    functions.fathom_use_team(
        ctypes.cast(parallel, c_void_p).value, ctypes.cast(barrier, c_void_p).value
    )
    return True
