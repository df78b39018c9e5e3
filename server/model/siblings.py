"""Which Linears of a model read the same tensor, found by watching one forward pass.

Query, key and value projections do in most architectures, gate and up projections too; nothing is known
here of names. What reads the same can be multiplied as one product (`packed`).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def find_siblings(model: nn.Module, forward: Callable[[], object]) -> list[list[nn.Linear]]:
    """Groups of two or more plain Linears that `forward` calls one after the other with one tensor.

    A module that is called more than once, or whose neighbour differs in width of input or in having a
    bias, is in no group.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []  # the tensors, since an id may be given again

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear):
            calls.append((module, args[0]))

    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    num_calls = Counter(id(module) for module, _ in calls)
    groups: list[list[nn.Linear]] = []
    last: Tensor | None = None
    for module, read in calls:
        is_alone = num_calls[id(module)] > 1
        if read is last and not is_alone and _is_alike(module, groups[-1][0]):
            groups[-1].append(module)
        else:
            groups.append([module])
        last = None if is_alone else read
    return [group for group in groups if len(group) > 1]


def _is_alike(one: nn.Linear, other: nn.Linear) -> bool:
    return one.in_features == other.in_features and (one.bias is None) == (other.bias is None)
