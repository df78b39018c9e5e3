"""Triton's compiler over all kernels, down to machine code: a line of JSON each. Nothing runs.

A program of its own, because a process that interprets kernels cannot compile them.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.model import lora_tiles, triton_fetch, triton_lora

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
FLAGS = {"IS_NEW": False, "HAS_BIAS": True, "HAS_GAIN": True, "HAS_BASE_BIAS": True}


def compile_kernel(
    name: str, constants: dict[str, object], dtype: str, capability: int, **options: int
) -> None:
    function = getattr(triton_fetch if name == "_fetch" else triton_lora, name)
    types = POINTERS | dict.fromkeys(WEIGHTS, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    found = {
        "name": name,
        "dtype": dtype,
        "capability": capability,
        "shared_bytes": made.metadata.shared,
        "is_matrix": "mma.sync" in ptx or "tcgen05.mma" in ptx,
        "overlaps": "griddepcontrol" in ptx,
        "is_bulk": "cp.async.bulk.prefetch" in ptx,
    }
    sys.stdout.write(json.dumps(found) + "\n")


PARTS = {
    "NUM_PARTS": 3, "TILES": (0, 2, 3), "MODULES": (0, 1, 2), "COLUMNS": (0, 512, 640),
    "WIDTHS": (512, 128, 128), "PLACES": (0, 512, 640),
}  # fmt: skip

for dtype, rank, capability in CASES:
    sizes = {
        "SLOTS": 8,
        "STACK": rank,
        "RANK": lora_tiles.padded(rank),
        "ROWS": lora_tiles.BLOCK_ROWS,
        "TURNS": 2,
        "FACTOR": FACTORS[dtype],
        "IS_EARLY": capability >= 90,
    }
    features = lora_tiles.features(rank, SIZES[dtype])
    columns = lora_tiles.columns(rank, SIZES[dtype], PARTS["WIDTHS"], 1000)
    shrink = sizes | {"SPLIT": 512, "BLOCK": features}
    expand = sizes | FLAGS | PARTS | {
        "SPLITS": 8, "SUMMED": lora_tiles.summed(rank, 8), "BLOCK": columns,
    }  # fmt: skip
    compile_kernel("_shrink", shrink, dtype, capability, num_stages=lora_tiles.STAGES)
    warps = lora_tiles.warps(rank, columns)
    compile_kernel("_expand", expand, dtype, capability, num_warps=warps)
    if capability >= 90:
        fetch = {
            "ROW_BYTES": 512 * SIZES[dtype], "UP_BYTES": 768 * rank * SIZES[dtype], "NUM_MODULES": 3,
            "PARTS": 2, "STACK": rank, "MODULES": 4, "ROWS": 64, "NUM_CHUNKS": 32, "CHUNK": 4096,
        }  # fmt: skip
        compile_kernel("_fetch", fetch, dtype, capability, num_warps=1)
