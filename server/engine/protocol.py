"""What the HTTP layer sees of the engine: the one seam a fake replaces in its tests.

`async_engine.AsyncEngine` is the real one. Everything here is called on the event loop, except that
what only reads (`adapters`, `adapter`, `calibrated_depth`) may be asked from any thread.
"""

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from server.engine.distribution import Distribution
from server.engine.request import (
    AdapterRef,
    CalibratedDepth,
    LoraSelection,
    Request,
    RequestOutput,
)
from server.errors import FathomError
from server.sources.location import RemoteAdapter


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the base model that are fixed once it is loaded."""

    name: str
    """Its id on the wire."""
    path: str
    num_layers: int
    vocab_size: int
    """Rows of the output matrix; token ids are in `0..vocab_size - 1`."""
    max_model_len: int
    created: int
    """Unix time of the load, for OpenAI's `created`."""
    revision: str = ""
    """Fingerprint of the base model's content."""


@dataclass(frozen=True, slots=True)
class LayerCount:
    """Token-layers of adapters' requests since the start: one token through one layer is one."""

    applied: int = 0
    """Ran with LoRA."""
    skipped: int = 0
    """Ran without, because they lie at or above the request's depth."""

    def __add__(self, other: "LayerCount") -> "LayerCount":
        return LayerCount(self.applied + other.applied, self.skipped + other.skipped)


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What steps took and held, since the start."""

    seconds: Distribution
    """Of one step, from choosing its sequences to their deltas."""
    num_seqs: Distribution
    num_tokens: Distribution
    """Prompt tokens of its chunks, and one for every sequence that decodes."""


@dataclass(frozen=True, slots=True)
class PlaceCount:
    """Adapters in one place, the device or host memory."""

    num_resident: int = 0
    num_loads: int = 0
    """Since the start, like `num_evictions`."""
    num_evictions: int = 0
    """Those that left for another."""


@dataclass(frozen=True, slots=True)
class AdapterCounts:
    """Adapters by place."""

    device: PlaceCount = PlaceCount()
    host: PlaceCount = PlaceCount()
    num_known: int = 0
    """That can be asked for by name; not those that only lie below the adapter root."""


Residency = Literal["device", "host", "disk"]
"""The nearest place in which an adapter's weights are."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for health, readiness and metrics."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    """Tokens in one block."""
    num_cached_tokens: int
    """Prompt tokens answered from the prefix cache since the start."""
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_recomputed_tokens: int
    """Computed once more because a preemption had dropped them."""
    num_steps: int
    layers: LayerCount
    """Over all adapters; `Engine.layer_counts` has each one's."""
    resident_depths: Mapping[int, int] = field(default_factory=dict)
    """Of the adapters on the device, by uid: their layers below it are there."""
    lora_bytes: int = 0
    """Of these layers."""
    num_looked_up_tokens: int = 0
    """Prompt tokens that the prefix cache was asked for, once a sequence."""


class SliceHost(Protocol):
    """What work in slices may use, on the engine's thread, inside its slices."""

    @property
    def model(self) -> Any:
        """The transformers model that serves."""

    def rows(self, adapter: AdapterRef) -> AbstractContextManager[Any]:
        """An adapter, as `boundary.rows.LoraRows`, lent to a sweep for as long as the block lasts."""

    def max_tokens(self) -> int:
        """Tokens that the next slice may run through a layer, as of now."""


Slices = Generator[Any, None, Any]
"""Work between whose yields the engine makes steps; at a yield it holds nothing on the model."""
MakeSlices = Callable[[SliceHost], Slices]


class Engine(Protocol):
    """One base model with its adapters, ready to generate."""

    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase

    @property
    def is_alive(self) -> bool:
        """False once the engine thread has ended, or does not come back from a step."""

    def stats(self) -> EngineStats:
        """Counters as of the last step; never blocks."""

    def layer_counts(self) -> Mapping[str, LayerCount]:
        """By adapter name, of those that ran: a copy, too long to make after every step.

        In the order in which they first ran.
        """

    def step_counts(self) -> StepCounts:
        """Of every step since the start; any thread may read them."""

    def adapter_counts(self) -> AdapterCounts:
        """Where adapters are, how often they came and went; any thread may ask."""

    def adapters(self) -> list[AdapterRef]:
        """Every adapter that was named or loaded and can be asked for, by name.

        Those that are not in host memory are among them, and none has its `content`. The same list
        until it changes.
        """

    def adapter(self, name: str) -> AdapterRef | None:
        """The one of `adapters` with this name, without looking at the others."""

    def residency(self, adapter: AdapterRef) -> Residency:
        """Where an adapter's weights are, as of the last step; on disk they must be read again."""

    def calibrated_depth(self, adapter: AdapterRef) -> CalibratedDepth | None:
        """What `auto` means for this adapter's content; None: the whole adapter."""

    def set_calibrated_depths(self, depths: Mapping[str, CalibratedDepth | None]) -> None:
        """From now on, for new requests: what `auto` means, by the adapters' content digests.

        None is the whole adapter, whatever lies beside its weights. A digest that is missing means
        what lies there, or else the whole adapter.
        """

    async def resolve(self, name: str) -> AdapterRef:
        """An adapter with its content, read from disk if it must. Raises NotFound, AdapterError."""

    async def run_slices(self, make: MakeSlices, on_progress: Callable[[Any], None]) -> Any:
        """Run work between steps, within its share of the time; what the generator returns.

        `make` is called, and its generator advanced, on the engine's thread; `on_progress` with
        whatever it yields on the event loop. Cancelling ends the work at its next yield. Raises
        what the work raises, and EngineDead.
        """

    async def select(
        self, model: str, depth: int | Literal["auto", "full"] | None
    ) -> LoraSelection:
        """Resolve a base or adapter name (no `@` suffix) and a depth (None: the server's default).

        Loads an adapter found under the adapter root when it is first asked for; only this
        request waits for that. Raises NotFound, BadRequest (depth out of range, or on the base).
        """

    async def load_adapter(
        self, name: str, path: Path | RemoteAdapter, *, replace: bool = False
    ) -> AdapterRef:
        """Read, validate and register an adapter. Raises Conflict, NotFound, AdapterError.

        The path is a client's: relative to the adapter root, or absolute and below it, or one that the
        operator named; so is a remote adapter, which an allowed source must cover. Raises BadRequest
        for any other, and SourceUnavailable for one that cannot be fetched now.
        """

    async def unload_adapter(self, name: str) -> None:
        """Forget a name; requests that run with it finish. Raises NotFound."""

    async def check_grammar(self, grammar: str) -> None:
        """Compile an llguidance grammar once, on a thread of the engine's.

        Raises BadRequest with the compiler's words, and QueueFull while too many others wait for it.
        """

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Submit and stream. Raises QueueFull or EngineDead before the first output.

        Closing the iterator (also by cancellation) aborts the request. The last output has
        `finished`; an output with `error` is the last.
        """

    def end_all(self, error: FathomError) -> None:
        """End every request with this error now, and refuse those that come later with it."""
