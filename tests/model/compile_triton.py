"""Triton's compiler over both kernels, down to machine code: a line of JSON each. Nothing runs.

A program of its own, because a process that interprets kernels cannot compile them.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.model import triton_lora

CASES = (
    ("bf16", 256, 80),
    ("bf16", 256, 90),
    ("bf16", 256, 100),
    ("bf16", 8, 90),
    ("fp32", 256, 80),
)
"""dtype, rank, compute capability."""
POINTERS = {
    "ranks": "*i32", "slots": "*i32", "depths": "*i32", "low_rank": "*fp32", "scaling": "*fp32",
}  # fmt: skip
WEIGHTS = ("x", "lora_A", "lora_B", "output", "bias", "gain", "base_bias")
FACTORS = {"bf16": triton.language.bfloat16, "fp32": triton.language.float32}
SIZES = {"bf16": 2, "fp32": 4}
FLAGS = {"HAS_BIAS": True, "HAS_GAIN": True, "HAS_BASE_BIAS": True}


def compile_kernel(name: str, constants: dict[str, object], dtype: str, capability: int) -> None:
    function = getattr(triton_lora, name)
    types = POINTERS | dict.fromkeys(WEIGHTS, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = made.asm["ptx"]
    found = {
        "name": name,
        "dtype": dtype,
        "capability": capability,
        "shared_bytes": made.metadata.shared,
        "is_matrix": "mma.sync" in ptx or "tcgen05.mma" in ptx,
    }
    sys.stdout.write(json.dumps(found) + "\n")


for dtype, rank, capability in CASES:
    tiles = {
        "RANK": triton_lora._padded(rank),
        "ROWS": triton_lora.BLOCK_ROWS,
        "BLOCK": triton_lora._block(rank, SIZES[dtype]),
        "FACTOR": FACTORS[dtype],
    }
    compile_kernel("_shrink", tiles | {"SPLIT": 512}, dtype, capability)
    compile_kernel("_expand", tiles | FLAGS | {"SPLITS": 8}, dtype, capability)
