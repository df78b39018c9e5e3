"""How long what a step of a tape makes is needed."""

from collections.abc import Sequence

from server.model.replay.bound import Bound
from server.model.replay.chain import Chain
from server.model.replay.tape import Call, Value


def over_after(steps: Sequence[Call | Chain | Bound], results: Sequence[Value]) -> list[list[int]]:
    """For each step the memory, by root, that nobody reads after it."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        made = step.outputs if isinstance(step, Call) else step.stores
        for value in (*step.inputs, *made):
            if value is not None:
                last[value.root] = index
    for value in results:
        last.pop(value.root, None)
    over: list[list[int]] = [[] for _ in steps]
    for root, index in last.items():
        over[index].append(root)
    return over
