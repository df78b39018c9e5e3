"""A function of tensors as a program, as `server.model.replay.decode` makes one of a model."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from server.model.native.library import Library, load
from server.model.native.structures import Pass
from server.model.replay.bound_steps import bound_steps
from server.model.replay.program import Arena, Program
from server.model.replay.tape import TapeWriter


def library() -> Library:
    """Of this machine; a test without one has nothing to test."""
    found = load()
    if isinstance(found, str):
        pytest.fail(found)
    return found


@torch.inference_mode()
def noted(
    function: Callable[..., Tensor | Sequence[Tensor]],
    *given: Tensor,
    arena: Arena | None = None,
    num_threads: int = 1,
) -> Program:
    """What `function` does with these very tensors, which may hold other numbers later."""
    writer = TapeWriter()
    with writer:
        result = function(*given)
    results = [writer.value_of(one) for one in ([result] if isinstance(result, Tensor) else result)]
    steps = bound_steps(writer.tape, results, lambda call: None)
    return Program(
        steps, writer.tape.given, results, library(), num_threads, arena or Arena(), Pass()
    )
