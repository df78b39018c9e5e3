"""DoRA's gain: the one number a row that turns a LoRA's output into DoRA's.

Called by `checkpoint` when an adapter is read, so that serving it needs no base weight.
"""

import torch
from torch import Tensor

from server.model.targets import Target

ROWS_AT_A_TIME = 4096  # bounds the float32 copy of W: 64 MB for 4096 columns


@torch.no_grad()
def dora_gain(
    target: Target, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """gain = m / ||W + scaling * B A||, one norm a row (DoRA, arXiv 2402.09353, eq. 5).

    lora_A [rank, in_features], lora_B [out_features, rank], magnitude [out_features]: CPU, any
    float dtype. W: the target's dequantized weight, on its own device, a block of rows at a time.
    Returns [out_features], float32, CPU. Not finite where a row of W + scaling B A is zero.
    """
    weight = target.weight()
    if target.kind == "conv1d":
        weight = weight.T
    lora_A = lora_A.to(weight.device, torch.float32)
    lora_B = lora_B.to(weight.device, torch.float32)
    norms = [
        torch.linalg.vector_norm(rows.float() + scaling * (rows_B @ lora_A), dim=1)
        for rows, rows_B in zip(
            torch.split(weight, ROWS_AT_A_TIME), torch.split(lora_B, ROWS_AT_A_TIME), strict=True
        )
    ]
    return magnitude.float() / torch.cat(norms).cpu()
