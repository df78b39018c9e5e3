"""How fast an engine decodes when every stream is running, and how fast memory would let it.

The engine's own steps, on this thread: scheduling, the model, sampling and text are part of it, HTTP
is not. Prompts are computed and recordings made before the clock starts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.bench.workload import WorkItem
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams

_WARM_STEPS = 3
_COPIES = 20
_ids = count()


def decode_rate(core: EngineCore, items: Sequence[WorkItem], num_steps: int) -> float:
    """Tokens a second over `num_steps` steps in which every item decodes. Raises as `decoding` does."""
    with decoding(core, items) as step:
        started_s = time.perf_counter()
        for _ in range(num_steps):
            step()
        synchronize(core.runner.model)
        elapsed_s = time.perf_counter() - started_s
    return len(items) * num_steps / elapsed_s


@contextmanager
def decoding(core: EngineCore, items: Sequence[WorkItem]) -> Iterator[Callable[[], None]]:
    """Steps in which every item decodes, once the device has done all before them. All are aborted after.

    Raises RuntimeError for an item that fails, or that ends while steps are taken.
    """
    ids = []
    for item in items:
        choice = item.choice
        lora = (
            core.registry.depths.resolve(None, None)
            if choice.adapter is None
            else core.registry.select(
                choice.adapter, "full" if choice.depth is None else choice.depth
            )
        )
        sampling = SamplingParams(item.output_len, temperature=0.0, ignore_eos=True)
        request = Request(f"decode-{next(_ids)}", item.prompt, sampling, lora)
        core.add(request)
        ids.append(request.id)
    try:
        while not _is_all_decoding(core, len(items)):
            _step(core)
        for _ in range(_WARM_STEPS):
            _step(core)
        synchronize(core.runner.model)
        yield lambda: _step(core)
    finally:
        for request_id in ids:
            core.abort(request_id)


def synchronize(model: PreTrainedModel) -> None:
    """Wait until a CUDA device has done all it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that copying a tensor reads and writes, at best."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(_COPIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * num_bytes / best_s


def weight_bytes(model: PreTrainedModel) -> int:
    """What one step reads of the weights: all, but of an input embedding of its own only a row.

    Counted on a copy without data, as a CPU's packed weights are no parameters.
    """
    with torch.device("meta"):
        like: Any = AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    total = sum(parameter.numel() for parameter in like.parameters())
    embedding, head = like.get_input_embeddings(), like.get_output_embeddings()
    if head.weight is not embedding.weight:
        total -= embedding.weight.numel()
    return int(total * model.dtype.itemsize)


def _is_all_decoding(core: EngineCore, num_items: int) -> bool:
    running = core.scheduler.running
    return len(running) == num_items and all(sequence.is_decoding for sequence in running)


def _step(core: EngineCore) -> None:
    for output in core.step():
        if output.error is not None:
            raise output.error
        if output.finished:
            raise RuntimeError("a completion ended before the steps that were to be timed")
