"""Which sequences can compute their next token before the host knows this one.

While a device computes a step, the host waits for its tokens, reads them, and prepares the next step,
and while it does that the device waits. So where nothing on the host decides what comes next, the next
step is launched with tokens that only the device knows (`runner.run_ahead`), and only then are this
step's read. A sequence that turns out to have ended computed one token too many, which is dropped.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from server.engine.sampler import Launched
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step that the device has, or is about to have, computed."""

    sequences: list[Sequence]
    """One a row."""
    launched: Launched

    @property
    def is_wanted(self) -> bool:
        """Whether any of them is still there to take its token."""
        return any(sequence.status is Status.RUNNING for sequence in self.sequences)


def rows_that_go_on(scheduler: Scheduler, sequences: Rows[Sequence]) -> list[int]:
    """Rows of the step that were drawn just now and whose sequences may go on, each with a block to.

    Empty where the next step needs the host first: to admit or compute a prompt, to find blocks, or
    because a sequence's next token depends on what this one is.
    """
    running = scheduler.running
    if scheduler.has_room or len(running) > len(sequences):
        return []
    going_on = []
    for row, sequence in enumerate(sequences):
        if sequence.status is not Status.RUNNING:
            continue
        if _needs_host(sequence):
            return []
        if sequence.num_output_tokens + 1 < sequence.request.sampling.max_tokens:
            going_on.append(row)
    if not all(scheduler.reserve(sequences[row]) for row in going_on):
        return []
    return going_on


def _needs_host(sequence: Sequence) -> bool:
    """Whether its next draw asks what tokens came before."""
    sampling = sequence.request.sampling
    return (
        sequence.num_to_compute > 0
        or sequence.matcher is not None
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
        or sequence.row.must_go_on
    )
