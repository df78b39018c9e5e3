"""One replica on paper: the engine's own scheduler, blocks, waiting line and slots, with steps that only
take time.

Nothing of the engine's policy is written anew: `Scheduler` plans every step from real `Sequence`s, whose
tokens are made up, over real `AdapterSlots`, whose adapters have no tensors. What is imitated is what
surrounds them: the step's duration, by its costs; the cache of adapters in host memory (`AdapterRegistry`);
and the limit on requests that are waiting. Prompts are unlike each other, so no prefix is found again.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import simpy
import torch

from server.bench.capacity.cost import Costs
from server.bench.capacity.step import shape_of
from server.bench.load import Timing
from server.bench.mix import Choice
from server.bench.trace import TraceRow
from server.engine.block_manager import BlockManager
from server.engine.request import AdapterRef, LoraSelection, Request, SamplingParams
from server.engine.scheduled import Scheduled
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, SequenceGroup
from server.model.adapters import AdapterSlots
from server.model.checkpoint import LoraCheckpoint
from server.model.hooks import LoraHooks
from server.model.targets import Targets

REFUSED = "refused: as many run and wait as may"


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """`fathom serve`'s settings of the same names.

    kv_tokens: what `kv_cache_bytes` holds.
    """

    num_layers: int
    max_loras: int = 8
    max_cpu_loras: int = 256
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    kv_tokens: int = 65_536
    block_size: int = 16


@dataclass(slots=True)
class ReplicaCounts:
    """What one replica did. busy_s: in steps. num_reads: adapters from disk. num_slot_loads: into slots."""

    num_requests: int = 0
    num_lora_requests: int = 0
    num_refused: int = 0
    num_reads: int = 0
    num_slot_loads: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_preemptions: int = 0
    busy_s: float = 0.0

    @property
    def slot_hit_rate(self) -> float | None:
        """Requests for an adapter that found it in its slot; None without any."""
        if not self.num_lora_requests:
            return None
        return 1 - self.num_slot_loads / self.num_lora_requests

    @property
    def host_hit_rate(self) -> float | None:
        """Those that found it in host memory."""
        if not self.num_lora_requests:
            return None
        return 1 - self.num_reads / self.num_lora_requests


@dataclass(frozen=True, slots=True)
class ReplicaName:
    """As Ray names replicas."""

    unique_id: str


class PaperSequence(Sequence):
    """A sequence without text, whose blocks are like nobody else's."""

    def __init__(self, request: Request, arrival: int, block_size: int, timing: Timing) -> None:
        group = SequenceGroup(request, arrival)
        unused: Any = None
        super().__init__(group, 0, b"", block_size, unused, unused, None)
        group.sequences.append(self)
        self.timing = timing

    def block_keys(self, num_blocks: int) -> list[bytes]:
        """None."""
        return []

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Never."""
        return False


class Replica:
    """A process of a simulation. `on_end` is called as each request leaves, refused ones included."""

    def __init__(
        self,
        env: simpy.Environment,
        name: str,
        settings: ReplicaSettings,
        costs: Costs,
        on_end: Callable[["Replica"], None] = lambda _: None,
        held: Iterable[str] = (),
        in_slots: Iterable[str] = (),
    ) -> None:
        """held: adapters in host memory from the start, the least recently used first.

        in_slots: those of them that are in slots too.
        """
        self.replica_id = ReplicaName(name)
        self.routing_stats: dict[str, frozenset[str]] = {}
        """What it said last; see `tell`."""
        self.counts = ReplicaCounts()
        self.num_ongoing = 0
        self._env = env
        self._settings = settings
        self._costs = costs
        self._on_end = on_end
        # Of the model, slots want the number of layers alone where adapters have no modules.
        targets = cast(Targets, SimpleNamespace(num_layers=settings.num_layers))
        self._slots = AdapterSlots(
            LoraHooks(settings.num_layers),
            targets,
            settings.max_loras,
            torch.float32,
            torch.device("cpu"),
        )
        self._slots.is_wanted = lambda uid: uid in self._current
        blocks = BlockManager(
            settings.kv_tokens // settings.block_size, settings.block_size, prefix_caching=False
        )
        self._scheduler = Scheduler(
            blocks, self._slots, settings.max_num_seqs, settings.max_num_batched_tokens
        )
        self._host: OrderedDict[str, AdapterRef] = OrderedDict()
        self._refs: dict[str, AdapterRef] = {}
        self._current: set[int] = set()
        """Of `_refs`: content that a new request may still get, in host memory or evicted since."""
        self._reading: dict[str, simpy.Event] = {}
        self._num_read = 0
        self._num_arrived = 0
        self._wake: simpy.Event | None = None
        for name in held:
            self._keep(name)
        for name in in_slots:
            uid, content = self._refs[name].uid, cast(LoraCheckpoint, self._refs[name].content)
            self._slots.acquire(uid, content)
            self._slots.release(uid)
        env.process(self._run())

    def tell(self) -> None:
        """Say what it holds, as `Replica.record_routing_stats` does."""
        names = {ref.uid: name for name, ref in self._refs.items()}
        on_device = frozenset(names[uid] for uid in self._slots.resident_uids if uid in names)
        self.routing_stats = {"device": on_device, "host": frozenset(self._host) - on_device}

    def submit(self, row: TraceRow, choice: Choice, timing: Timing) -> None:
        """Take a request now, which is answered into its timing, or refuse it there."""
        self.counts.num_requests += 1
        settings = self._settings
        if self.num_ongoing >= settings.max_num_seqs + settings.max_num_waiting:
            self.counts.num_refused += 1
            timing.error, timing.end_s = REFUSED, self._env.now
            self._on_end(self)
            return
        self.num_ongoing += 1
        depth = settings.num_layers if choice.depth is None else choice.depth
        if choice.adapter is None:
            self._queue(row, LoraSelection(None, 0, settings.num_layers, "base"), timing)
            return
        self.counts.num_lora_requests += depth > 0
        self._env.process(self._select(row, choice.adapter, depth, timing))

    def _select(
        self, row: TraceRow, name: str, depth: int, timing: Timing
    ) -> Generator[simpy.Event, None, None]:
        """As the registry does: from host memory, else from disk, which one request does for all."""
        while name not in self._host:
            if name in self._reading:
                yield self._reading[name]
                continue
            self._reading[name] = self._env.event()
            yield self._env.timeout(self._costs.load.disk_s)
            self._keep(name)
            self.counts.num_reads += 1
            self._reading.pop(name).succeed()
        self._host.move_to_end(name)
        lora = LoraSelection(self._host[name], depth, self._settings.num_layers, "request")
        self._queue(row, lora, timing)

    def _keep(self, name: str) -> None:
        """An adapter was read: new content under a known name, as far as slots can tell."""
        self._num_read += 1
        if name in self._refs:
            self._current.discard(self._refs[name].uid)
        num_layers = self._settings.num_layers
        content = LoraCheckpoint({}, {}, 1, num_layers, name, 0, None)
        ref = AdapterRef(name, self._num_read, name, 1, num_layers, 0, "", content=content)
        self._refs[name] = self._host[name] = ref
        self._current.add(ref.uid)
        while len(self._host) > self._settings.max_cpu_loras:
            self._host.popitem(last=False)

    def _queue(self, row: TraceRow, lora: LoraSelection, timing: Timing) -> None:
        sampling = SamplingParams(row.output_len, temperature=0.0, ignore_eos=True)
        number = self._num_arrived
        self._num_arrived += 1
        request = Request(str(number), (0,) * row.prompt_len, sampling, lora)
        self._scheduler.add(PaperSequence(request, number, self._settings.block_size, timing))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _run(self) -> Generator[simpy.Event, None, None]:
        """Step after step, as `EngineCore.step` does them."""
        scheduler, counts, costs = self._scheduler, self.counts, self._costs
        while True:
            if not scheduler.has_work:
                self._wake = self._env.event()
                yield self._wake
            self._slots.drop_unwanted()
            num_loads = self._slots.num_loads
            scheduled = scheduler.schedule()
            num_loads = self._slots.num_loads - num_loads
            shape = shape_of(scheduled, self._settings.num_layers)
            seconds = costs.step.step_s(shape) + num_loads * costs.load.slot_s
            counts.num_slot_loads += num_loads
            counts.num_steps += 1
            counts.num_rows += len(scheduled)
            counts.num_tokens += shape.num_tokens
            counts.num_preemptions = scheduler.num_preemptions
            counts.busy_s += seconds
            yield self._env.timeout(seconds)
            self._take(scheduled)

    def _take(self, scheduled: list[Scheduled]) -> None:
        """Give every sequence whose tokens are all computed its next one."""
        now = self._env.now
        for item in scheduled:
            sequence = cast(PaperSequence, item.sequence)
            is_last_chunk = item.is_last_chunk
            self._scheduler.computed(sequence, item.num_tokens)
            if not is_last_chunk:
                continue
            sequence.token_ids.append(0)
            timing = sequence.timing
            timing.piece_s.append(now)
            timing.num_output_tokens += 1
            if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                self._scheduler.finish(sequence)
                timing.end_s = now
                self.num_ongoing -= 1
                self._on_end(self)
