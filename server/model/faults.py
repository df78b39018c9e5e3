"""What an exception in a step means: too little memory, a device that is gone, or a fault of its own.

Only asked after something has raised. Knows devices, not requests.
"""

import torch

_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once might fit. The CPU's allocator and cuBLAS raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_TEXTS)


def is_device_lost(device: torch.device) -> bool:
    """Whether the device fails at the least that it can be asked.

    An illegal access, an assertion in a kernel or hardware that fell off the bus break a CUDA context
    for good: then everything raises, whatever it is. So one number is sent there, added to and read back.
    """
    if device.type == "cpu":
        return False
    try:
        return float(torch.ones(1, device=device).add_(1).item()) != 2.0
    except Exception as error:  # noqa: BLE001 -- whatever it raises, it does not work
        return not is_out_of_memory(error)


def free_memory(device: torch.device) -> None:
    """Give back what torch's allocator keeps for later, so that pieces of another size fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
