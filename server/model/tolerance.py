"""How far apart logits may be that two right ways of computing a step give.

Kernels sum in different orders and round differently, and rounding to 16 bits grows from layer to layer:
on a random Llama of 8 billion parameters in bfloat16, 32 layers, 2e-2 to 5e-2 between one set of kernels
and another, where a chain of operators that is 1 % off in every layer gives 2e-1.
"""

import torch

LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest accepted ||one - other|| / ||other||, by dtype."""
