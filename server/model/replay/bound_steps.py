"""What a tape becomes: kernels' calls wherever kernels can do it, torch's operators between them."""

from collections.abc import Callable, Sequence

from server.model.replay.bound import Bindable, Bound
from server.model.replay.bound_chain import BoundChain
from server.model.replay.bound_operators import bind_operator
from server.model.replay.chain import Chain, fused
from server.model.replay.tape import Call, Tape, Value


def bound_steps(
    tape: Tape, results: Sequence[Value], after: Callable[[Call], Bound | None]
) -> list[Call | Bound]:
    """The tape's calls, in an order that gives the same; nothing is placed yet.

    results: what is read when all is done. after: what belongs behind a call, asked once for each.
    """
    steps: list[Call | Bound] = []
    for part in fused(tape.calls, results):
        if isinstance(part, Chain):
            steps.append(BoundChain(part))
            continue
        bound = (
            part.function.bind(part) if isinstance(part.function, Bindable) else bind_operator(part)
        )
        steps.append(part if bound is None else bound)
        if (behind := after(part)) is not None:
            steps.append(behind)
    return steps
