"""A fleet on paper: requests arrive, a router places them, replicas answer them.

The outcome is what `fathom bench` notes of a real run, so that both are measured by the same functions.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from random import Random

import simpy

from server.bench.capacity.cost import Costs
from server.bench.capacity.replica import Replica, ReplicaCounts, ReplicaSettings
from server.bench.capacity.routing import Routing, choose, policy
from server.bench.load import LoadResult, Timing
from server.bench.mix import Choice
from server.bench.trace import TraceRow
from server.bench.workload import Workload

TELL_S = 1.0
"""How often replicas say what they hold; as `request_routing_stats_period_s` of the Ray application."""


def replica_name(index: int) -> str:
    """Of a fleet's replicas."""
    return f"replica-{index}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """max_ongoing: of one replica; what comes beyond waits at the router. As `max_ongoing_requests`."""

    num_replicas: int
    routing: Routing
    replica: ReplicaSettings
    max_ongoing: int | None = 128


@dataclass(frozen=True, slots=True)
class Outcome:
    """result: every request's times, in order of arrival. replicas: what each did."""

    result: LoadResult
    replicas: tuple[ReplicaCounts, ...]

    @property
    def total(self) -> ReplicaCounts:
        """All replicas' counts together."""
        names = ReplicaCounts.__dataclass_fields__
        return ReplicaCounts(
            **{name: sum(getattr(one, name) for one in self.replicas) for name in names}
        )

    @property
    def utilisations(self) -> list[float]:
        """Share of the time that each replica was in steps."""
        return [one.busy_s / self.result.duration_s for one in self.replicas]


def simulate(
    workload: Workload,
    fleet: Fleet,
    costs: Costs,
    seed: int,
    held: Sequence[Sequence[str]] | None = None,
    in_slots: Sequence[str] = (),
) -> Outcome:
    """Run until the last request has ended.

    held: adapters in each replica's host memory at the start. in_slots: those in slots of every replica.
    """
    return _Simulation(workload, fleet, costs, seed, held, in_slots).run()


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        fleet: Fleet,
        costs: Costs,
        seed: int,
        held: Sequence[Sequence[str]] | None,
        in_slots: Sequence[str],
    ) -> None:
        self._env = simpy.Environment()
        self._workload = workload
        self._max_ongoing = fleet.max_ongoing
        self._replicas = [
            Replica(
                self._env, replica_name(index), fleet.replica, costs, self._ended, names, in_slots
            )
            for index, names in enumerate(held or [()] * fleet.num_replicas)
        ]
        self._random = Random(f"{seed}/routing")
        self._ranks = policy(fleet.routing, self._replicas, self._random)
        self._waiting: deque[tuple[TraceRow, Choice, Timing]] = deque()
        self._num_left = len(workload.rows)
        self._is_over = self._env.event()

    def run(self) -> Outcome:
        timings: list[Timing] = []
        self._env.process(self._arrive(timings))
        self._env.process(self._tell())
        if self._num_left:
            self._env.run(until=self._is_over)
        result = LoadResult(self._env.now, tuple(timings))
        return Outcome(result, tuple(replica.counts for replica in self._replicas))

    def _arrive(self, timings: list[Timing]) -> Generator[simpy.Event, None, None]:
        for row, choice in zip(self._workload.rows, self._workload.choices, strict=True):
            yield self._env.timeout(max(0.0, row.arrival_s - self._env.now))
            timing = Timing(row.arrival_s, num_prompt_tokens=row.prompt_len)
            timings.append(timing)
            self._waiting.append((row, choice, timing))
            self._place()

    def _tell(self) -> Generator[simpy.Event, None, None]:
        while True:
            for replica in self._replicas:
                replica.tell()
            yield self._env.timeout(TELL_S)

    def _place(self) -> None:
        """Those that wait at the router, in order of arrival, until nobody has room."""
        while self._waiting:
            row, choice, timing = self._waiting[0]
            replica = choose(self._ranks(choice.adapter or ""), self._max_ongoing, self._random)
            if replica is None:
                return
            self._waiting.popleft()
            replica.submit(row, choice, timing)

    def _ended(self, _: Replica) -> None:
        self._num_left -= 1
        if not self._num_left:
            self._is_over.succeed()
        self._place()
