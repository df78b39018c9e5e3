"""Triton's compiler over kernels of chains, down to machine code: a line of JSON each. Nothing runs.

A program of its own, because a process that interprets kernels cannot compile them.
"""

import json
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.model.replay.chain import Chain, fused
from server.model.replay.tape import TapeWriter
from server.model.replay.triton_chain import TritonChain

# Last, so that the server is the one that is installed.
sys.path.append(str(Path(__file__).resolve().parents[3]))
from tests.model.replay.test_chain import OPERATORS

SIZES = {"rms norm": (8, 4096), "rotate": (8, 32, 128), "gate": (1, 14336), "gelu": (8, 3072)}


def compile_chain(name: str) -> None:
    size = SIZES[name]
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in (size, size[-1:], size[-1:]))
    writer = TapeWriter()
    with writer, torch.inference_mode():
        made = OPERATORS[name](x, weight, bias)
    (chain,) = fused(writer.tape.calls, [writer.value_of(made)])
    assert isinstance(chain, Chain)
    chain_kernel = TritonChain(chain)
    kernel = chain_kernel._kernel
    pointers = [name for name in kernel.arg_names if name.startswith("p")]
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(pointers, "*bf16")
    # As Triton finds them when it runs: addresses and strides are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if not argument.startswith("num_")
    }
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned)
    options = {"num_warps": chain_kernel._num_warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    found = {
        "name": name,
        "shared_bytes": made.metadata.shared,
        "is_rounded": any(f"{name}.bf16" in ptx for name in ("cvt.rn", "mul.rn", "add.rn")),
        "is_fused": "fma.rn.bf16" in ptx,
        "is_vectorised": "ld.global.v" in ptx,
    }
    sys.stdout.write(json.dumps(found) + "\n")


for name in SIZES:
    compile_chain(name)
