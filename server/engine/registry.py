"""Adapters by name: reading them, keeping them in host memory, and selecting the one a request asks for.

Registering looks at an adapter's header, reading at its weights: thousands may be registered of which
hundreds are in memory. Whatever a request does here costs the same however many are registered.

Reading happens on whichever thread calls `load` (never the event loop, never the engine's); looking up
is safe from any. What a request got stays with that request: `AdapterRef.content` keeps its weights
alive when the name is unloaded, replaced, or evicted from host memory.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from typing import Literal

import structlog

from server import confined
from server.engine.depths import Depth, Depths
from server.engine.places import Asked, Location, Place, Places
from server.engine.protocol import PlaceCount
from server.engine.record_beside import record_beside
from server.engine.request import AdapterRef, LoraSelection
from server.errors import BadRequest, Conflict, NotFound
from server.model.checkpoint import (
    MAX_RANK,
    lora_layers,
    module_kinds,
    read_checkpoint,
)
from server.model.outline import OutlineReader
from server.model.targets import Targets
from server.sources.fetcher import Fetcher

log = structlog.get_logger(__name__)


class AdapterRegistry:
    """Every adapter that can be asked for by name."""

    def __init__(
        self,
        targets: Targets,
        *,
        base_name: str,
        base_revision: str,
        adapter_root: Path | None = None,
        max_cpu_loras: int = 256,
        max_lora_rank: int = 256,
        default_depth: Literal["auto", "full"] = "auto",
        fetcher: Fetcher | None = None,
        client_sources: Sequence[str] = (),
    ) -> None:
        """fetcher: brings remote adapters. client_sources: prefixes of those that clients may name."""
        self._targets = targets
        self.depths = Depths(targets.num_layers, default_depth)
        self._places = Places(adapter_root, fetcher, client_sources)
        self._max_lora_rank = max_lora_rank
        self._outlines = OutlineReader(targets, self._max_rank)
        self._base_name = base_name
        self._base_revision = base_revision
        self._max_cpu_loras = max_cpu_loras
        self._lock = RLock()
        self._known: dict[str, AdapterRef] = {}
        """Every name that was registered or loaded, without its weights. One that is not in `_loaded` was
        evicted or not read yet, and is read when asked for."""
        self._current: set[int] = set()
        """Their uids."""
        self._by_name: list[AdapterRef] | None = None
        """`_known` in order, until it changes."""
        self._known_places: dict[str, Place] = {}
        """Where each of `_known` is read from."""
        self._loaded: OrderedDict[str, AdapterRef] = OrderedDict()
        self._unloaded: set[str] = set()
        """Names under the root that were unloaded on purpose: they do not come back by being asked for."""
        self._reading: dict[str, Lock] = {}
        self._uids = count(1)
        self._num_loads = 0
        self._num_evictions = 0

    def known(self) -> list[AdapterRef]:
        """Adapters that were registered or loaded, by name, without their weights.

        Also those evicted since. The same list until it changes; not to be changed by who asks.
        """
        with self._lock:
            if self._by_name is None:
                self._by_name = sorted(self._known.values(), key=lambda ref: ref.name)
            return self._by_name

    def known_as(self, name: str) -> AdapterRef | None:
        """The one of `known` with this name."""
        with self._lock:
            return self._known.get(name)

    def loaded(self) -> list[AdapterRef]:
        """Adapters in host memory, by name."""
        with self._lock:
            return sorted(self._loaded.values(), key=lambda ref: ref.name)

    def is_current(self, uid: int) -> bool:
        """Whether a new request may still get this content. Any thread may ask.

        It may not once the name was unloaded, replaced or read again.
        """
        return uid in self._current

    @property
    def num_known(self) -> int:
        """How many there are of `known`."""
        return len(self._known)

    def host_count(self) -> PlaceCount:
        """Adapters in host memory."""
        with self._lock:
            return PlaceCount(len(self._loaded), self._num_loads, self._num_evictions)

    def is_loaded(self, adapter: AdapterRef) -> bool:
        """Whether this content is in host memory."""
        with self._lock:
            loaded = self._loaded.get(adapter.name)
            return loaded is not None and loaded.uid == adapter.uid

    def register(self, name: str, path: Location) -> AdapterRef:
        """Let a name be asked for, without reading its weights: they are read when it first is.

        Raises like `load` for whatever config and header show to be wrong; what only the weights
        tell, such as a value that is not finite, is raised to who asks.
        """
        self._check_name(name)
        place = self._places.here(self._places.of_operator(path))
        outline = self._outlines.read(place.path)
        ref = AdapterRef(
            name=name,
            uid=next(self._uids),
            digest=None,
            rank=outline.rank,
            max_depth=outline.max_depth,
            num_bytes=outline.num_bytes,
            path=str(place),
            modules=outline.modules,
            layers=outline.layers,
        )
        with self._lock:
            if name in self._known:
                raise _taken(name)
            self._know(ref, place)
        return ref

    def load(self, name: str, path: Location, *, replace: bool = False) -> AdapterRef:
        """Read, validate and register the operator's adapter under a new identity.

        Raises Conflict for a name in use (unless `replace`), NotFound for a path that does not
        exist, AdapterError for a checkpoint that is refused; then nothing has changed.
        """
        return self._load(name, self._places.of_operator(path), replace)

    def load_confined(self, name: str, path: Location, *, replace: bool = False) -> AdapterRef:
        """The same for what a client gave: a path, relative to the adapter root or absolute, or a source.

        Raises BadRequest too, for a path that leads out of the root or a source that clients may not
        name, unless it is word for word what the operator named. Nobody is asked for it then.
        """
        return self._load(name, self._places.of_client(path), replace)

    def unload(self, name: str) -> None:
        """Forget a name. Requests that run with it finish. Raises NotFound."""
        with self._lock:
            if name not in self._known:
                raise NotFound(f"adapter {name!r} is not loaded", param="lora_name")
            self._current.discard(self._known[name].uid)
            del self._known[name], self._known_places[name]
            self._by_name = None
            self._loaded.pop(name, None)
            self._unloaded.add(name)

    def find(self, name: str) -> AdapterRef | None:
        """The adapter if it is in host memory, now its most recently used; None is not an answer yet."""
        with self._lock:
            ref = self._loaded.get(name)
            if ref is not None:
                self._loaded.move_to_end(name)
            return ref

    def fetch(self, name: str) -> AdapterRef:
        """The adapter, read from disk if it was evicted or lies under the root. Raises NotFound."""
        place = self._place_of(name)  # before the lock: an unknown name leaves nothing behind
        if place is None:
            raise _unknown(name)
        with self._reader(name):
            return self.find(name) or self._read(name, place, is_asked_for=True)

    def select(self, model: str, depth: Depth | None) -> LoraSelection:
        """Resolve a base or adapter name and a depth. Reads from disk if it must.

        Raises NotFound, AdapterError, and BadRequest for a depth out of range.
        """
        if model == self._base_name:
            return self.depths.resolve(None, depth)
        return self.depths.resolve(self.find(model) or self.fetch(model), depth)

    def _load(self, name: str, place: Asked, replace: bool) -> AdapterRef:
        self._check_name(name)
        with self._reader(name):
            with self._lock:
                if name in self._known and not replace:
                    raise _taken(name)
            return self._read(name, place)

    def _read(self, name: str, asked: Asked, *, is_asked_for: bool = False) -> AdapterRef:
        place = self._places.here(asked)
        path, root, _ = place
        checkpoint = read_checkpoint(path, self._targets, max_rank=self._max_rank, root=root)
        boundary, boundary_error = record_beside(
            path, checkpoint, self._base_revision, self._targets.num_layers, root=root
        )
        if boundary_error is not None:
            log.warning("calibrated depth not applied", adapter=name, reason=boundary_error)
        ref = AdapterRef(
            name=name,
            uid=next(self._uids),
            digest=checkpoint.digest,
            rank=checkpoint.rank,
            max_depth=checkpoint.max_depth,
            num_bytes=checkpoint.num_bytes,
            path=str(place),
            modules=module_kinds(checkpoint.modules),
            layers=lora_layers(checkpoint.modules, self._targets),
            boundary=boundary,
            boundary_error=boundary_error,
            content=checkpoint,
        )
        with self._lock:
            if is_asked_for and self._place_of(name) != asked:
                raise _unknown(name)  # unloaded meanwhile: reading it must not bring it back
            self._know(dataclasses.replace(ref, content=None), place)
            self._loaded[name] = ref
            self._loaded.move_to_end(name)
            self._num_loads += 1
            while len(self._loaded) > self._max_cpu_loras:
                self._loaded.popitem(last=False)
                self._num_evictions += 1
        return ref

    def _know(self, ref: AdapterRef, place: Place) -> None:
        if ref.name in self._known:
            self._current.discard(self._known[ref.name].uid)
        self._current.add(ref.uid)
        self._known[ref.name] = ref
        self._known_places[ref.name] = place
        self._by_name = None
        self._unloaded.discard(ref.name)

    def _reader(self, name: str) -> Lock:
        # One reader a name: two requests for the same cold adapter read it once.
        with self._lock:
            return self._reading.setdefault(name, Lock())

    def _place_of(self, name: str) -> Place | None:
        with self._lock:
            if name in self._known_places:
                return self._known_places[name]
            if name in self._unloaded:
                return None
        return self._places.below_root(name)

    @property
    def _max_rank(self) -> int:
        return min(self._max_lora_rank, MAX_RANK)

    def _check_name(self, name: str) -> None:
        if not confined.is_plain_name(name) or "@" in name or ":" in name:
            raise BadRequest(
                f"adapter name {name!r} must be printable, without '/', '\\', '@', ':' and not begin "
                "with '.'",
                param="lora_name",
            )
        if name == self._base_name:
            raise Conflict(f"{name!r} is the base model's own name", param="lora_name")


def _taken(name: str) -> Conflict:
    return Conflict(
        f"adapter {name!r} is loaded already; unload it or ask to replace it", param="lora_name"
    )


def _unknown(name: str) -> NotFound:
    return NotFound(f"the model {name!r} does not exist", param="model", code="model_not_found")
