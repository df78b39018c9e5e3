"""A step that raises is run again in parts, until only what is at fault has failed.

Halves, and halves of those: one sequence at fault among 64 costs about as much as three more steps, not
64. It is also what a step too large for the memory needs, down to a prompt's chunk cut in pieces. Writing
the same keys and values again does no harm, and whose number was drawn in vain draws it again.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows

import numpy as np
import structlog
from numpy.typing import NDArray

from server.engine.sampler import Sampled, Sampler
from server.engine.scheduled import Scheduled
from server.engine.sequence import Sequence, Status
from server.errors import DeviceLost
from server.model import faults
from server.model.runner import Logits, ModelRunner

log = structlog.get_logger(__name__)

Mask = NDArray[np.int32] | None
Fail = Callable[[Sequence, Exception], None]
"""Ends the sequence that is at fault, and its request."""


def forward(
    runner: ModelRunner, scheduled: Rows[Scheduled], fail: Fail, *, is_last_try: bool = False
) -> Iterator[tuple[Logits, list[Scheduled]]]:
    """Logits of the step's parts, each with the items they belong to, in their order.

    Each part is run when it is asked for: of a chunk in pieces, the second needs the first's to be noted.
    Raises DeviceLost.
    """
    items = [item for item in scheduled if item.sequence.status is Status.RUNNING]
    if not items:
        return
    try:
        logits, order = runner.run([item.batched() for item in items])
    except Exception as raised:  # noqa: BLE001 -- whatever a model raises ends one request, not the loop
        error = understood(runner, raised)
    else:
        yield logits, [items[index] for index in order]
        return
    # Outside of `except`: the exception would keep the step's tensors alive.
    is_too_large = faults.is_out_of_memory(error)
    parts = _parts(items, is_too_large=is_too_large)
    if parts:
        del error  # whose frames hold what the step computed
        for part in parts:
            yield from forward(runner, part, fail)
    elif is_too_large and not is_last_try:
        yield from forward(runner, items, fail, is_last_try=True)  # memory was given back meanwhile
    else:
        fail(items[0].sequence, error)


def draw(
    runner: ModelRunner,
    sampler: Sampler,
    logits: Logits,
    sequences: Rows[Sequence],
    masks: Rows[Mask],
    fail: Fail,
) -> list[Sampled]:
    """One sample a row, after all rows together have raised."""
    half = (len(sequences) + 1) // 2
    samples: list[Sampled] = []
    for rows in (slice(0, half), slice(half, None)):
        part = sequences[rows]
        if not part:
            continue
        try:
            samples += sampler.sample(logits[rows], [each.row for each in part], masks[rows])
            continue
        except Exception as raised:  # noqa: BLE001 -- as in `forward`
            error = understood(runner, raised)
        for sequence in part:
            sequence.row.rewind()
        if len(part) > 1:
            samples += draw(runner, sampler, logits[rows], part, masks[rows], fail)
        else:
            fail(part[0], error)
            samples.append(Sampled(-1, None, error=True))
    return samples


def understood(runner: ModelRunner, error: Exception) -> Exception:
    """The same without what it holds in memory. Raises DeviceLost where the device is gone."""
    if runner.is_device_lost():
        raise DeviceLost(f"the device does not answer after {error!r}") from error
    log.warning("a step failed and is run in parts", error=error)
    if faults.is_out_of_memory(error):
        error.__traceback__ = error.__context__ = None
        runner.free_memory()
    return error


def _parts(items: list[Scheduled], *, is_too_large: bool) -> list[list[Scheduled]]:
    """Smaller steps that come to the same; none where it can be no smaller."""
    if len(items) > 1:
        half = len(items) // 2
        return [items[:half], items[half:]]
    (item,) = items
    if not is_too_large or item.num_tokens == 1:
        return []
    return [[half] for half in item.halves()]
